//! The images of the torture: made once, read by every row, each with content of its own.

use lazuli_tests::{
    Compression, ImageBuilder, Result, Scratch, TarLayer, TestRegistry, programs::lazuli_ok, registry_server::push_to,
    samples::noise,
};

/// Images of one file, `/data`, that is in no hot pack: one for each fault that is tried alone.
pub(crate) const SINGLES: u64 = 24;
/// Length of that file: more than a frame.
pub(crate) const SINGLE_LEN: usize = 3 << 20;
/// Files `/files/<n>` of the image `healthy`.
pub(crate) const HEALTHY_FILES: u64 = 8;
/// Length of each.
pub(crate) const HEALTHY_LEN: usize = 1 << 20;
/// Files `/files/<n>` of the image `slow`: a reader for each, and more readers than any queue of today has room for.
pub(crate) const SLOW_FILES: u64 = 200;
/// Length of each.
pub(crate) const SLOW_LEN: usize = 512 << 10;
/// The content of `/etc/msg` in `ordinary`, an image that is not converted.
pub(crate) const ORDINARY: &str = "ordinary\n";

/// The repository of single image `number`.
pub(crate) fn single(number: u64) -> String {
    format!("single-{number}")
}

/// The content of its file.
pub(crate) fn single_content(number: u64) -> Vec<u8> {
    noise(10_000 + number, SINGLE_LEN)
}

/// The content of file `number` of `healthy`.
pub(crate) fn healthy_content(number: u64) -> Vec<u8> {
    noise(20_000 + number, HEALTHY_LEN)
}

/// The content of file `number` of `slow`.
pub(crate) fn slow_content(number: u64) -> Vec<u8> {
    noise(30_000 + number, SLOW_LEN)
}

/// Publishes all of them, converted ones as `<repository>:lazy`, `ordinary:1` as it is.
pub(crate) fn publish(scratch: &Scratch, registry: &TestRegistry) -> Result<()> {
    for number in 0..SINGLES {
        let layer = TarLayer::new().file("data", single_content(number));
        publish_lazy(scratch, registry.address(), &single(number), layer)?;
    }
    publish_lazy(scratch, registry.address(), "healthy", files(HEALTHY_FILES, healthy_content))?;
    publish_lazy(scratch, registry.address(), "slow", files(SLOW_FILES, slow_content))?;
    let ordinary = TarLayer::new().directory("etc").file("etc/msg", ORDINARY).finish()?;
    let layout = ImageBuilder::new().layer(ordinary, Compression::Gzip).write(scratch, "ordinary")?;
    push_to(registry.address(), &layout, "ordinary:1").map(drop)
}

fn files(count: u64, content: impl Fn(u64) -> Vec<u8>) -> TarLayer {
    let layer = TarLayer::new().directory("files");
    (0..count).fold(layer, |layer, number| layer.file(&format!("files/{number}"), content(number)))
}

/// Makes an image of one layer, converts it and pushes it as `<repository>:lazy`.
pub(crate) fn publish_lazy(scratch: &Scratch, registry: &str, repository: &str, layer: TarLayer) -> Result<()> {
    let layout = write_lazy(scratch, repository, vec![layer.finish()?])?;
    push_to(registry, &layout, &format!("{repository}:lazy")).map(drop)
}

/// Makes an image of these layers, lowest first, and converts it into the layout `<scratch>/<name>-lazy`.
pub(crate) fn write_lazy(scratch: &Scratch, name: &str, layers: Vec<Vec<u8>>) -> Result<String> {
    let image = layers.into_iter().fold(ImageBuilder::new(), |image, tar| image.layer(tar, Compression::None));
    let original = image.write(scratch, &format!("{name}-original"))?;
    let lazy = format!("oci:{}:latest", scratch.join(format!("{name}-lazy")).display());
    lazuli_ok(["convert", &original, &lazy])?;
    Ok(lazy)
}
