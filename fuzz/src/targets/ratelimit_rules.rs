use weir_proto::manifest::{parse, to_yaml};

/// A rule file is refused or becomes rules that can be applied, or that say what must be corrected first; notes have a place.
pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok((resources, notes)) = weir::fuzzing::ratelimit(text) else { return };
    assert!(notes.iter().all(|(path, text)| !path.is_empty() && !text.is_empty()));
    let told = notes.iter().any(|(_, text)| text.starts_with("has to be corrected by hand"));
    let written = to_yaml(&resources);
    match parse(&written, "imported") {
        Ok(again) => assert_eq!(again.len(), resources.len()),
        Err(error) => assert!(told, "{error}\n{written}"),
    }
}
