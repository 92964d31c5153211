//! Where a backend's API is: the URL of the server and the path of the API below it.

use crate::resource::check::Check;
use crate::v1;

/// Where OpenAI's API and most servers that speak it have their endpoints.
const API_BASE_PATH: &str = "/v1";
/// Longest base path, bytes.
const PATH_BYTES_MAX: usize = 256;

/// Scheme, authority and path prefix, without a trailing slash.
pub(super) fn judge_url(text: &str, check: &mut Check) -> Option<http::Uri> {
    let mut bad = |m: &str| {
        check.violation("url", m);
        None
    };
    // Not part of what is sent to a server, so it can only be a mistake.
    if text.contains('#') {
        return bad("must not have a fragment ('#')");
    }
    let Ok(uri) = text.trim_end_matches('/').parse::<http::Uri>() else {
        return bad("is not a URL, such as http://host:8000");
    };
    match (uri.scheme_str(), uri.authority()) {
        (Some("http" | "https"), Some(authority)) if authority.as_str().contains('@') => {
            bad("must not hold credentials; use the field credential")
        }
        (Some("http" | "https"), Some(_)) if uri.query().is_some() => bad("must not have a query"),
        (Some("http" | "https"), Some(_)) if has_dot_segment(uri.path()) => {
            bad("must not have . or .. as a part of its path")
        }
        (Some("http" | "https"), Some(_)) => Some(uri),
        _ => bad("must start with http:// or https:// and name a host"),
    }
}

/// What stands between the URL and an endpoint, without a trailing slash.
pub(super) fn judge_api_base_path(w: &v1::BackendSpec, check: &mut Check) -> String {
    let text = w.api_base_path.as_str();
    if text.is_empty() {
        if w.url.trim_end_matches('/').ends_with("/v1") {
            // What providers call their base URL ends so; with /v1/v1 every request would be a 404.
            check.violation(
                "url",
                "ends with /v1, which is appended to it: leave it out, or set api_base_path",
            );
        }
        return API_BASE_PATH.to_owned();
    }
    if let Some(objection) = objection(text) {
        check.violation("api_base_path", objection);
    }
    text.trim_end_matches('/').to_owned()
}

/// Why a text is no base path; `None` when it is one.
fn objection(text: &str) -> Option<&'static str> {
    if text.len() > PATH_BYTES_MAX {
        return Some("must be at most 256 bytes");
    }
    if !text.starts_with('/') {
        return Some("must be a path that starts with '/', such as /v1beta/openai, or / for none");
    }
    if text.contains(['?', '#']) {
        return Some("must not have a query ('?') or a fragment ('#')");
    }
    let segments = text.strip_suffix('/').unwrap_or(text);
    if segments.contains("//") || segments.ends_with('/') {
        return Some("must not have empty parts ('//')");
    }
    if has_dot_segment(text) {
        return Some("must not have . or .. as a part of it");
    }
    let is_path = text.is_ascii() && http::uri::PathAndQuery::try_from(text).is_ok();
    (!is_path)
        .then_some("is not a path of a URL: write other characters than letters, digits and -._~ as %XX")
}

/// Whether a part of a path is `.` or `..`, also as servers decode it: it would lead out of the prefix.
fn has_dot_segment(path: &str) -> bool {
    path.split('/').any(|part| {
        let plain = part.to_ascii_lowercase().replace("%2e", ".");
        plain == "." || plain == ".."
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::resource::{Resource, Spec};

    fn judged(url: &str, path: &str) -> Result<(String, String), String> {
        let spec = v1::BackendSpec {
            pool: "p".into(),
            url: url.into(),
            api_base_path: path.into(),
            models: [("m".to_owned(), String::new())].into(),
            ..Default::default()
        };
        let spec = Some(v1::resource::Spec::Backend(spec));
        let wire = v1::Resource { name: "b".into(), spec, ..Default::default() };
        let resource = Resource::try_from(&wire).map_err(|e| e.to_string())?;
        let Spec::Backend(backend) = resource.spec else { panic!("a backend") };
        Ok((backend.url.to_string(), backend.api_path("/chat/completions")))
    }

    #[test]
    fn an_endpoint_is_below_the_base_path() {
        for (path, want) in [
            ("", "/v1/chat/completions"),
            ("/v1", "/v1/chat/completions"),
            ("/", "/chat/completions"),
            ("/v1beta/openai", "/v1beta/openai/chat/completions"),
            ("/v1beta/openai/", "/v1beta/openai/chat/completions"),
            ("/api/paas/v4", "/api/paas/v4/chat/completions"),
            ("/openai/deployments/a%20b", "/openai/deployments/a%20b/chat/completions"),
            ("/v1...", "/v1.../chat/completions"),
        ] {
            let judged = judged("https://api.example/prefix/", path).expect(path);
            assert_eq!(judged, ("https://api.example/prefix".to_owned(), want.to_owned()), "{path}");
        }
    }

    #[test]
    fn what_is_no_base_path_is_refused_with_a_reason() {
        for (path, says) in [
            ("v1", "starts with '/'"),
            ("https://x/v1", "starts with '/'"),
            ("/v1?key=1", "query"),
            ("/v1#a", "fragment"),
            ("//", "empty parts"),
            ("//evil.example", "empty parts"),
            ("/a//b", "empty parts"),
            ("/v1//", "empty parts"),
            ("/..", ".."),
            ("/v1/../admin", ".."),
            ("/v1/%2e%2E/admin", ".."),
            ("/./v1", ". or .."),
            ("/v 1", "is not a path"),
            ("/v1\r\nx: y", "is not a path"),
            ("/ü", "is not a path"),
        ] {
            let error = judged("https://api.example", path).expect_err(path);
            assert!(error.starts_with("backend.api_base_path: ") && error.contains(says), "{path}: {error}");
        }
        let long = format!("/{}", "x".repeat(256));
        assert!(judged("https://api.example", &long).expect_err("too long").contains("256 bytes"));
        assert!(judged("https://api.example/a/../b", "").expect_err("dots").contains("backend.url"));
    }

    #[test]
    fn a_url_that_names_the_version_once_more_is_a_mistake() {
        for url in ["https://api.example/v1", "https://api.example/openai/v1/"] {
            let error = judged(url, "").expect_err(url);
            assert!(
                error.contains("backend.url: ends with /v1") && error.contains("api_base_path"),
                "{error}"
            );
            assert!(judged(url, "/").is_ok(), "it says that nothing comes between");
        }
        assert!(judged("https://api.example/v10", "").is_ok());
    }

    proptest! {
        #[test]
        fn a_base_path_that_is_taken_makes_a_path_of_a_url(path in "[/a-z0-9.%?# ü-]{0,24}") {
            if let Ok((_, joined)) = judged("https://api.example", &path) {
                prop_assert!(joined.parse::<http::uri::PathAndQuery>().is_ok_and(|p| p.query().is_none()), "{}", joined);
                prop_assert!(joined.ends_with("/chat/completions") && !joined.contains("//"), "{}", joined);
            }
        }
    }
}
