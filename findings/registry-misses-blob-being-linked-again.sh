#!/usr/bin/env bash
# A registry that keeps its data in files refuses a manifest whose blobs are all there, now and then, while another client
# pushes one of these blobs to the same repository: it reads the link of the blob while that is being written anew.
#
# - docker-registry 2.8.2 (Debian 12): soon a manifest is answered with 400,
#   MANIFEST_BLOB_UNKNOWN and often DIGEST_INVALID beside it. The same manifest sent once more is taken. Seen:
#   "manifest 10: 400 DIGEST_INVALID and MANIFEST_BLOB_UNKNOWN; sent again: 201".
# - distribution v3.1.2: none in a minute.
#
# Two build machines that push images over one base to one repository meet it; a client that takes 400 for final fails.
#
# Needs apt-get with Debian 12, Go 1.26 with a module proxy, and python3. Takes five minutes, most of it building; exits 1
# when a registry behaves otherwise.
set -euo pipefail
work=$(mktemp -d); server=
trap '[ -z "$server" ] || kill "$server"; chmod -R u+w "$work"; rm -rf "$work"' EXIT
export GOTOOLCHAIN=auto GOFLAGS=-mod=mod

mkdir "$work/deb" "$work/module" && cd "$work/deb"
apt-get download docker-registry=2.8.2+ds1-1 >/dev/null 2>&1 || apt-get download docker-registry >/dev/null
dpkg -x docker-registry_*.deb .
cd "$work/module"
printf 'module throwaway\n\ngo 1.26\n' >go.mod
go get github.com/distribution/distribution/v3@v3.1.2 2>/dev/null
go build -o "$work/registry3" github.com/distribution/distribution/v3/cmd/registry
cd "$work"

cat >push.py <<'PY'
"""push.py PORT: four clients of one repository; says whether a manifest was refused, and taken when sent again."""
import hashlib, http.client, json, sys, threading, time

PORT, UNTIL = int(sys.argv[1]), time.time() + 60
TYPE = "application/vnd.oci.image.manifest.v1+json"
BLOBS = [b"{}", b"a layer"]
found, failures, taken = [], [], []


def digest(content):
    return "sha256:" + hashlib.sha256(content).hexdigest()


def ask(connection, method, path, body=b"", headers={}):
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.getheader("Location"), answer.read().decode()


def push_blob(connection, content):
    _, place, _ = ask(connection, "POST", "/v2/app/blobs/uploads/")
    place = place[place.index("/v2/"):]
    status, _, text = ask(connection, "PUT", f"{place}&digest={digest(content)}", content)
    if status != 201:
        failures.append(f"blob: {status} {text}")


def push_blobs():
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    while not found and time.time() < UNTIL:
        push_blob(connection, BLOBS[1])


def push_manifests(number):
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    config, layer = ({"digest": digest(blob), "size": len(blob)} for blob in BLOBS)
    config["mediaType"] = "application/vnd.oci.image.config.v1+json"
    layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar"
    manifest = {"schemaVersion": 2, "mediaType": TYPE, "config": config, "layers": [layer]}
    body, count = json.dumps(manifest).encode(), 0
    while not found and time.time() < UNTIL:
        put = lambda: ask(connection, "PUT", f"/v2/app/manifests/t{number}", body, {"Content-Type": TYPE})
        status, _, text = put()
        count += 1
        taken.extend([status] if status == 201 else [])
        if status == 400 and "MANIFEST_BLOB_UNKNOWN" in text:
            codes = sorted(error["code"] for error in json.loads(text)["errors"])
            for _ in range(20):
                status, _, _ = put()
                if status == 201:
                    break
            found.append(f"manifest {count}: 400 {' and '.join(codes)}; sent again: {status}")


first = http.client.HTTPConnection("127.0.0.1", PORT)
[push_blob(first, blob) for blob in BLOBS]
threads = [threading.Thread(target=push_blobs) for _ in range(2)]
threads += [threading.Thread(target=push_manifests, args=(number,)) for number in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
if found:
    print(found[0])
    sys.exit(0 if found[0].endswith("201") else 2)
print("no manifest was refused" if len(taken) > 500 else f"only {len(taken)} manifests were taken: {failures[:1]}")
sys.exit(1 if len(taken) > 500 else 2)
PY

code=0
try() {
    local name=$1 program=$2 port=$3
    mkdir "$work/$name"
    cat >"$work/$name.yml" <<YML
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: $work/$name}}
http: {addr: "127.0.0.1:$port"}
YML
    "$program" serve "$work/$name.yml" >"$work/$name.log" 2>&1 &
    server=$!
    until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.1; done
    printf '%s: ' "$name"
    local ended=0
    python3 push.py "$port" || ended=$?
    [ "$ended" = "$4" ] || code=1
    kill "$server"; wait "$server" 2>/dev/null || :; server=
}
try docker-registry-2.8.2 "$work/deb/usr/bin/docker-registry" 5391 0
try distribution-3.1.2 "$work/registry3" 5392 1
exit "$code"
