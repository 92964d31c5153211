use prost::Message as _;
use weir_proto::manifest::{parse, to_json, to_json_with_status, to_yaml, to_yaml_with_status};

/// A text is resources, which are the same when written and read again, or has a list of mistakes that lie inside it.
pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let resources = match parse(text, "f") {
        Ok(resources) => resources,
        Err(error) => {
            // A document has about as many mistakes as it has fields, and is not cut in the middle.
            assert!(!error.0.is_empty() && error.0.len() <= 100 + text.len(), "{} problems", error.0.len());
            let lines = text.split(['\n', '\r']).count() as u64 + 1;
            for problem in &error.0 {
                assert!(problem.line.is_none_or(|line| line <= lines), "{problem} in {lines} lines");
                assert!(!problem.message.is_empty());
            }
            // A mistake may quote one value, and no more.
            assert!(error.to_string().len() <= (64 << 10) + 16 * text.len());
            return;
        }
    };
    for written in [to_yaml(&resources), to_json(&resources), to_yaml_with_status(&resources)] {
        let again = parse(&written, "again").unwrap_or_else(|error| panic!("{error}\n{written}"));
        let bytes = |all: &[weir_proto::v1::Resource]| -> Vec<_> {
            all.iter().map(|r| (r.name.clone(), r.spec.clone())).collect()
        };
        assert_eq!(bytes(&again), bytes(&resources), "{written}");
    }
    to_json_with_status(&resources);
    assert!(resources.iter().map(prost::Message::encoded_len).sum::<usize>() <= 64 * text.len());
    drop(resources.iter().map(|resource| resource.encode_to_vec()).collect::<Vec<_>>());
}
