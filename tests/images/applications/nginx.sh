#!/bin/bash
# The command of the image `nginx`: starts it, prints "ready" when it has answered a request, then sleeps for as many
# seconds as the argument says.
nginx -g 'daemon off;' &
until { exec 3<>/dev/tcp/127.0.0.1/8080; } 2>/dev/null; do
    kill -0 $! 2>/dev/null || { echo "nginx has ended"; exit 1; }
    sleep 0.005
done
printf 'GET / HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
read -r _ status _ <&3
[ "$status" = 200 ] || { echo "nginx answered $status"; exit 1; }
echo ready
[ $# = 0 ] || sleep "$1"
kill $!
