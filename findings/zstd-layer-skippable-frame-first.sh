#!/usr/bin/env bash
# A zstd layer may begin with a skippable frame (RFC 8878, 3.1.2): every decoder skips it. Two libraries that guess the
# compression from the first four bytes know the magic number of a data frame only, and take such a layer for a plain tar:
#
# - go.podman.io/image v5.42.1 (the library of podman, buildah and skopeo): a copy that asks for gzip answers no error
#   and writes a layer called tar+gzip in which gzip wraps the zstd stream. Its config's diff ID is then wrong.
# - go-containerregistry v0.22.1 (crane): `crane export` of the image ends with "unexpected EOF".
#
# The same frames in the other order are handled rightly by both, and umoci v0.6.0 reads either.
#
# Needs Go 1.26 with a module proxy, zstd and python3. Takes two minutes of processor time; exits 1 when a tool behaves
# otherwise.
set -euo pipefail
work=$(mktemp -d); server=
trap '[ -z "$server" ] || kill "$server"; chmod -R u+w "$work"; rm -rf "$work"' EXIT
export GOTOOLCHAIN=auto GOFLAGS=-mod=mod GOBIN="$work/bin"

# build NAME MODULE@VERSION PACKAGE: a tool in a module of its own.
build() {
    mkdir -p "$work/$1" && cd "$work/$1"
    [ -f go.mod ] || printf 'module throwaway\n\ngo 1.26\n' >go.mod
    go get "$2" 2>/dev/null
    go build -tags containers_image_openpgp,containers_image_storage_stub -o "$work/bin/$1" "$3"
}
build crane github.com/google/go-containerregistry@v0.22.1 github.com/google/go-containerregistry/cmd/crane
build umoci github.com/opencontainers/umoci@v0.6.0 github.com/opencontainers/umoci/cmd/umoci
mkdir "$work/to-gzip" && cat >"$work/to-gzip/main.go" <<'GO'
// to-gzip FROM TO: copies the image t of one layout to another one, layers as gzip.
package main

import (
	"context"
	"io"
	"log"
	"os"

	"go.podman.io/image/v5/copy"
	"go.podman.io/image/v5/oci/layout"
	"go.podman.io/image/v5/pkg/compression"
	"go.podman.io/image/v5/signature"
	"go.podman.io/image/v5/types"
)

func main() {
	accept := &signature.Policy{Default: signature.PolicyRequirements{signature.NewPRInsecureAcceptAnything()}}
	policy, err := signature.NewPolicyContext(accept)
	check(err)
	from, err := layout.NewReference(os.Args[1], "t")
	check(err)
	to, err := layout.NewReference(os.Args[2], "t")
	check(err)
	_, err = copy.Image(context.Background(), policy, to, from, &copy.Options{
		ReportWriter:           io.Discard,
		DestinationCtx:         &types.SystemContext{CompressionFormat: &compression.Gzip},
		ForceCompressionFormat: true,
	})
	check(err)
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
GO
build to-gzip go.podman.io/image/v5@v5.42.1 .
cd "$work"

# Two layouts with the image t, one layer of one file: the skippable frame first, or last.
python3 - <<'PY'
import hashlib, io, json, os, subprocess, tarfile

stream = io.BytesIO()
with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
    entry = tarfile.TarInfo("hello")
    entry.size = 6
    tar.addfile(entry, io.BytesIO(b"hello\n"))
plain = stream.getvalue()
data_frame = subprocess.run(["zstd", "-qc"], input=plain, stdout=subprocess.PIPE, check=True).stdout
skippable_frame = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"note"
OCI = "application/vnd.oci.image."

for name, blob in ("first", skippable_frame + data_frame), ("last", data_frame + skippable_frame):
    assert subprocess.run(["zstd", "-qdc"], input=blob, stdout=subprocess.PIPE, check=True).stdout == plain
    os.makedirs(f"{name}/blobs/sha256")

    def descriptor(content, media_type):
        digest = hashlib.sha256(content).hexdigest()
        open(f"{name}/blobs/sha256/{digest}", "wb").write(content)
        return {"mediaType": OCI + media_type, "digest": "sha256:" + digest, "size": len(content)}

    diff_id = "sha256:" + hashlib.sha256(plain).hexdigest()
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI + "manifest.v1+json",
        "config": descriptor(json.dumps(config).encode(), "config.v1+json"),
        "layers": [descriptor(blob, "layer.v1.tar+zstd")],
    }
    entry = descriptor(json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "t"}
    json.dump({"schemaVersion": 2, "manifests": [entry]}, open(f"{name}/index.json", "w"))
    json.dump({"imageLayoutVersion": "1.0.0"}, open(f"{name}/oci-layout", "w"))
PY

# The media type of the copied layer, and a name for the first four bytes below its gzip.
inside() {
    python3 - "$1" <<'PY'
import gzip, json, sys
root = sys.argv[1]
read = lambda digest: open(f"{root}/blobs/sha256/{digest[7:]}", "rb").read()
layer = json.loads(read(json.load(open(f"{root}/index.json"))["manifests"][0]["digest"]))["layers"][0]
content = gzip.decompress(read(layer["digest"]))
kinds = {b"\x50\x2a\x4d\x18": "zstd, skippable frame", b"hell": "tar"}
print(layer["mediaType"].rsplit(".", 1)[1], "of", kinds.get(content[:4], content[:4].hex()))
PY
}
bin/crane registry serve --address 127.0.0.1:0 >served 2>&1 &
server=$!
for _ in $(seq 100); do grep -q 'port [0-9]' served && break; sleep 0.1; done
registry=127.0.0.1:$(sed -nE 's/.*port ([0-9]+).*/\1/p' served)
for name in first last; do
    bin/to-gzip "$name" "gzip-$name" && code=0 || code=$?
    echo "image library, skippable frame $name: exit $code, $(inside "gzip-$name")"
    bin/crane push "$name" "$registry/$name:t" >/dev/null 2>&1
    bin/crane export "$registry/$name:t" exported 2>error && code=0 || code=$?
    echo "crane export, skippable frame $name: exit $code$(sed -n 's/^Error/, Error/p' error)"
    bin/umoci --log error unpack --rootless --image "$name:t" "unpacked-$name" && code=0 || code=$?
    echo "umoci unpack, skippable frame $name: exit $code, $(cat "unpacked-$name/rootfs/hello")"
done | tee seen

# Seen on Debian 12 with Go 1.27.
diff - seen <<'SEEN' && echo "as described"
image library, skippable frame first: exit 0, tar+gzip of zstd, skippable frame
crane export, skippable frame first: exit 1, Error: reading tar: unexpected EOF
umoci unpack, skippable frame first: exit 0, hello
image library, skippable frame last: exit 0, tar+gzip of tar
crane export, skippable frame last: exit 0
umoci unpack, skippable frame last: exit 0, hello
SEEN
