#!/usr/bin/env bash
# `soci convert --prefetch-file /etc/wanted` of soci-snapshotter 0.16.1 finds no file in a layer whose tar names begin
# with "./", as `tar -C ROOT .` writes them: it says "not found in any layer", ends with exit code 0, and the converted
# image has no prefetch artifact. The same files under names without "./" are found. The wanted path is cleaned before it
# is compared, the name in the zTOC is not.
#
# Needs Go 1.26 with a module proxy, gcc, zlib's headers and python3. Takes three minutes of processor time, most of them
# to build soci; exits 1 when soci behaves otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
export GOTOOLCHAIN=auto GOFLAGS=-mod=mod
cd "$work"
printf 'module throwaway\n\ngo 1.26\n' >go.mod
module=github.com/awslabs/soci-snapshotter
go get $module@v0.16.1 2>/dev/null
# Its programs are a module without versions of its own: this is the one of that release.
go mod edit -require $module/cmd@v0.0.0-20260930233240-61147fe7c929 -replace $module=$module@v0.16.1
go build -o soci $module/cmd/soci 2>/dev/null

# Two layouts of the same two files: under names with "./", and without.
python3 - <<'PY'
import gzip, hashlib, io, json, os, random, tarfile

noise = random.Random(1).randbytes(1 << 20)
OCI = "application/vnd.oci.image."
for layout, prefix in {"with": "./", "without": ""}.items():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in {"etc/wanted": b"wanted\n", "etc/noise": noise}.items():
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    plain = stream.getvalue()
    os.makedirs(f"{layout}/blobs/sha256")

    def descriptor(content, media_type, **more):
        digest = hashlib.sha256(content).hexdigest()
        open(f"{layout}/blobs/sha256/{digest}", "wb").write(content)
        return {"mediaType": OCI + media_type, "digest": "sha256:" + digest, "size": len(content), **more}

    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(plain).hexdigest()]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI + "manifest.v1+json",
        "config": descriptor(json.dumps(config).encode(), "config.v1+json"),
        "layers": [descriptor(gzip.compress(plain, mtime=0), "layer.v1.tar+gzip")],
    }
    named = descriptor(
        json.dumps(manifest).encode(), "manifest.v1+json",
        platform={"architecture": "amd64", "os": "linux"},
        annotations={"org.opencontainers.image.ref.name": "latest"},
    )
    index = {"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": [named]}
    json.dump(index, open(f"{layout}/index.json", "w"))
    json.dump({"imageLayoutVersion": "1.0.0"}, open(f"{layout}/oci-layout", "w"))
PY

for layout in with without; do
    ./soci convert --standalone --format oci-dir --min-layer-size 0 --prefetch-file /etc/wanted "$layout" "$layout.soci" \
        >said 2>&1 && code=0 || code=$?
    found=$(grep -c 'not found in any layer' said || true)
    artifacts=$(cat "$layout".soci/blobs/sha256/* | grep -ac 'vnd.amazon.soci.prefetch.v1+json' || true)
    echo "$layout ./: exit $code, not found: $found, index that names a prefetch artifact: $([ "$artifacts" -gt 0 ] && echo yes || echo no)"
done | tee seen

# Seen on Debian 12 with Go 1.27.
diff - seen <<'SEEN' && echo "as described"
with ./: exit 0, not found: 1, index that names a prefetch artifact: no
without ./: exit 0, not found: 0, index that names a prefetch artifact: yes
SEEN
