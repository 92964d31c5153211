use weir_proto::manifest::{parse, to_yaml};

/// A configuration is refused or becomes resources that can be applied; notes have a place.
pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok((resources, notes)) = weir::fuzzing::litellm(text) else { return };
    assert!(notes.iter().all(|(path, text)| !path.is_empty() || !text.is_empty()));
    let written = to_yaml(&resources);
    let again = parse(&written, "imported").unwrap_or_else(|error| panic!("{error}\n{written}"));
    assert_eq!(again.len(), resources.len());
}
