//! The fuzzer of one target: `WEIR_FUZZ_TARGET` names it, the arguments are libFuzzer's. Started by `fuzz/run`.

#![no_main]

use std::sync::LazyLock;

/// The target that this process runs.
static TARGET: LazyLock<weir_fuzz::Target> = LazyLock::new(|| {
    let name = std::env::var("WEIR_FUZZ_TARGET").unwrap_or_default();
    let known = || weir_fuzz::TARGETS.iter().map(|target| target.name).collect::<Vec<_>>().join(", ");
    let target = weir_fuzz::TARGETS.iter().find(|target| target.name == name);
    *target.unwrap_or_else(|| panic!("WEIR_FUZZ_TARGET: '{name}' is not a target; there are {}", known()))
});

libfuzzer_sys::fuzz_target!(init: LazyLock::force(&TARGET), |data: &[u8]| (TARGET.run)(data));
