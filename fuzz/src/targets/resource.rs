use prost::Message as _;
use weir_proto::manifest::{parse, to_yaml};
use weir_proto::resource::{Name, Resource};
use weir_proto::v1;

/// Any message is a resource or has mistakes with a place; one that is a resource can be written as YAML and read again.
pub(crate) fn run(data: &[u8]) {
    let Ok(wire) = v1::Resource::decode(data) else { return };
    match Resource::try_from(&wire) {
        Ok(resource) => {
            assert!(resource.references().iter().all(|reference| Name::parse(reference.name.as_str()).is_ok()));
            let written = to_yaml(std::slice::from_ref(&wire));
            let again = parse(&written, "again").unwrap_or_else(|error| panic!("{error}\n{written}"));
            assert_eq!(Resource::try_from(&again[0]).expect("it was parsed"), resource, "{written}");
        }
        Err(violations) => {
            assert!(!violations.0.is_empty());
            assert!(violations.0.iter().all(|v| !v.path.is_empty() && !v.message.is_empty()));
        }
    }
}
