use weir_gateway::control::credentials::CredentialSources;
use weir_proto::resource::{CredentialRef, Resource, Spec};
use weir_proto::v1;

use crate::input::Input;

/// Whatever an operator lists, no setting of Weir is a credential; by default only what is called one is; and a reference that
/// may be declared leads nowhere else.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (listed, variable) = (input.text(), input.text());
    let sources = CredentialSources {
        credential_env: listed.split(',').map(str::to_owned).collect(),
        ..CredentialSources::default()
    };
    if sources.allows(variable) {
        assert!(!variable.to_ascii_uppercase().starts_with("WEIR_"), "{variable} is allowed by {listed}");
    }
    if CredentialSources::default().allows(variable) {
        let named = variable.ends_with("_API_KEY")
            || variable.ends_with("_CREDENTIAL")
            || variable.starts_with("CREDENTIAL_");
        assert!(named, "{variable} is allowed by default");
    }
    let backend = v1::BackendSpec {
        pool: "p".into(),
        url: "http://h".into(),
        credential: variable.to_owned(),
        models: [("m".to_owned(), String::new())].into(),
        ..Default::default()
    };
    let wire = v1::Resource {
        name: "b".into(),
        spec: Some(v1::resource::Spec::Backend(backend)),
        ..Default::default()
    };
    let Ok(Resource { spec: Spec::Backend(backend), .. }) = Resource::try_from(&wire) else { return };
    match backend.credential.filter(|credential| credential.objection().is_none()) {
        None => {}
        Some(CredentialRef::Env(name)) => {
            assert!(!name.is_empty() && name.len() <= 256 && !CredentialRef::is_setting_of_weir(&name));
        }
        Some(CredentialRef::File(path)) => {
            assert!(path.starts_with('/') && path.len() <= 1024, "{path:?}");
            assert!(!path.split('/').any(|part| part == "..") && !path.chars().any(char::is_control));
        }
    }
}
