//! The complete configuration of `deploy/examples`, and an example of each kind from it.

/// The whole file.
pub(super) const COMPLETE: &str = include_str!("../../../../deploy/examples/complete.yaml");

/// The first document of a kind, without the comments above it; empty if there is none.
pub(super) fn of(kind: &str) -> String {
    let first_line = format!("kind: {kind}");
    let without_head = |document: &'static str| {
        let lines: Vec<&str> = document.lines().skip_while(|line| line.starts_with('#')).collect();
        (lines.first() == Some(&first_line.as_str())).then(|| lines.join("\n"))
    };
    COMPLETE.split("\n---\n").find_map(without_head).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use weir_proto::manifest;
    use weir_proto::resource::{KINDS, kind_name, kind_of};

    #[test]
    fn every_kind_has_an_example_of_its_own() {
        for kind in KINDS {
            let text = super::of(kind_name(kind));
            let resources = manifest::parse(&text, "complete.yaml").unwrap_or_else(|error| panic!("{error}"));
            let kinds: Vec<_> = resources.iter().map(kind_of).collect();
            assert_eq!(kinds, [kind], "{text}");
        }
    }
}
