use weir_control_plane::fuzzing::{copy, stored};

use crate::input::{Input, sealed};

/// A file is refused or is a copy, which is the same when written again; and what a store with it in it holds can be shown.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let right = input.byte() & 1 == 0;
    let file = sealed(b"WEIRBAK1", right, input.rest());
    if let Ok(written) = copy(&file) {
        assert_eq!(copy(&written).as_ref(), Ok(&written));
        let shown = stored(&file);
        assert_eq!(shown, stored(&written));
        for resource in shown.into_iter().flat_map(|(resources, _)| resources) {
            let wire = weir_proto::resource::Resource::try_from(&resource);
            assert!(wire.is_ok(), "a resource in the store that is none: {wire:?}");
        }
    }
}
