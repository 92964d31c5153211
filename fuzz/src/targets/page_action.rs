use weir_control_plane::fuzzing::action;

/// A body is one of the changes that the page makes, or is refused.
pub(crate) fn run(data: &[u8]) {
    if let Ok((action, _)) = action(data) {
        let value: serde_json::Value = serde_json::from_slice(data).expect("a change is JSON");
        assert!(value["action"].is_string(), "{action}");
        assert!(!action.starts_with("Weight") || value["weight"].as_u64().is_some_and(|w| u32::try_from(w).is_ok()));
    }
}
