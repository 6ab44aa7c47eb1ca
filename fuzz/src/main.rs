//! One target under libFuzzer: `LAZULI_FUZZ_TARGET` names it, the arguments are libFuzzer's.

#![no_main]

use std::{process::exit, sync::LazyLock};

use lazuli_fuzz::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("LAZULI_FUZZ_TARGET").unwrap_or_default();
    TARGETS.into_iter().find(|target| target.name == name).unwrap_or_else(|| {
        let names = TARGETS.map(|target| target.name).join(", ");
        eprintln!("LAZULI_FUZZ_TARGET is {name:?}, expected one of {names}");
        exit(2)
    })
});

fuzz_target!(|data: &[u8]| (TARGET.run)(data));
