"""How long lazuli-fused takes to mount a tree of 100,000 files: python3 benches/mount_tree.py DIRECTORY

Prints milliseconds from request to answer, in kernel and in portable mode: cold, with the layers' indexes on the node
and nothing else; second, in a new daemon that finds what the first one made; again, in the same daemon.
Part of benches/mounts.
"""

import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time

LAYERS, FILES = 5, 20_000
ROUNDS = 5
LABEL = "containerd.io/snapshot/lazuli/"


def put(layout, data):
    digest = hashlib.sha256(data).hexdigest()
    with open(f"{layout}/blobs/sha256/{digest}", "wb") as blob:
        blob.write(data)
    return {"digest": "sha256:" + digest, "size": len(data)}


def layer(number):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for file in range(FILES):
            # Directories of 50 files, many of which several layers share.
            entry = tarfile.TarInfo(f"lib/package-{file // 1000}/module_{file // 50}/source_{number}_{file}.py")
            content = f"name = {number * FILES + file}\n".encode() * 20
            entry.size, entry.mtime = len(content), 1_700_000_000 + file % 7
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def write_image(layout):
    os.makedirs(f"{layout}/blobs/sha256")
    layers = [put(layout, layer(number)) for number in range(LAYERS)]
    root_fs = {"type": "layers", "diff_ids": [blob["digest"] for blob in layers]}
    config = put(layout, json.dumps({"architecture": "amd64", "os": "linux", "rootfs": root_fs}).encode())
    media = "application/vnd.oci.image."
    manifest = {
        "schemaVersion": 2,
        "mediaType": media + "manifest.v1+json",
        "config": {"mediaType": media + "config.v1+json", **config},
        "layers": [{"mediaType": media + "layer.v1.tar", **blob} for blob in layers],
    }
    index = {"mediaType": media + "manifest.v1+json", **put(layout, json.dumps(manifest).encode())}
    with open(f"{layout}/index.json", "w") as file:
        json.dump({"schemaVersion": 2, "manifests": [index]}, file)
    with open(f"{layout}/oci-layout", "w") as file:
        file.write('{"imageLayoutVersion": "1.0.0"}')


def remote_layers(layout, image):
    """What a snapshotter learns from the annotations of the manifest."""
    with open(f"{layout}/index.json") as file:
        digest = json.load(file)["manifests"][0]["digest"]
    with open(f"{layout}/blobs/" + digest.replace(":", "/")) as file:
        layers = json.load(file)["layers"]
    for annotations in (layer["annotations"] for layer in layers):
        value = lambda name: annotations[LABEL + name]
        index = {
            "offset": int(value("index.offset")),
            "compressed_len": int(value("index.compressed-len")),
            "plain_len": int(value("index.plain-len")),
            "digest": value("index.digest"),
        }
        hot_len = int(annotations.get(LABEL + "hot.len", 0))
        layer = {"blob": value("blob.digest"), "blob_len": int(value("blob.len")), "index": index, "hot_len": hot_len}
        yield {"layer": layer, "image": image}


def serve_blobs(layout):
    """The part of a registry that a node needs; returns its address."""

    class Blobs(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            with open(f"{layout}/blobs/sha256/{self.path.rsplit(':')[-1]}", "rb") as file:
                blob = file.read()
            start, end = map(int, re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            part = blob[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(blob)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Blobs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"127.0.0.1:{server.server_address[1]}"


class Fused:
    def __init__(self, root, mode):
        self.address = f"{root}/fused.sock"
        command = ["target/release/lazuli-fused", "--root", root, "--address", self.address, "--mode", mode]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while "ready" not in (line := self.process.stderr.readline()):
            assert line, "lazuli-fused has ended"
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def ask(self, request):
        """Milliseconds to the answer."""
        start = time.monotonic()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.address)
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(connection.makefile().readline())
        assert answer["response"] != "error", answer
        return (time.monotonic() - start) * 1000, answer

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait() == 0


def measure(root, mode, layers):
    shutil.rmtree(root, ignore_errors=True)
    os.makedirs(root)
    fused = Fused(root, mode)
    for layer in layers:
        fused.ask({"request": "announce_layer", "layer": layer})
    while len(fused.ask({"request": "status"})[1]["layers"]) < LAYERS:
        time.sleep(0.05)
    request = {"request": "mount_tree", "layers": layers}
    cold, answer = fused.ask(request)
    assert sum(len(files) for _, _, files in os.walk(answer["path"])) == LAYERS * FILES
    again, _ = fused.ask(request)
    fused.stop()
    fused = Fused(root, mode)
    second, _ = fused.ask(request)
    fused.stop()
    return cold, second, again


def main():
    work = sys.argv[1]
    write_image(f"{work}/plain")
    target = f"oci:{work}/many:lazy"
    subprocess.run(
        ["target/release/lazuli", "convert", f"oci:{work}/plain", target], check=True, capture_output=True
    )
    layers = list(remote_layers(f"{work}/many", serve_blobs(f"{work}/many") + "/many:lazy"))
    print(f"mount of {LAYERS * FILES} files, {LAYERS} layers     cold   second    again")
    for mode in ("erofs", "fuse"):
        rounds = [measure(f"{work}/node", mode, layers) for _ in range(ROUNDS)]
        medians = [sorted(figures)[ROUNDS // 2] for figures in zip(*rounds)]
        print(f"{mode:32}" + "".join(f"{figure:6.0f} ms" for figure in medians))


main()
