//! Metrics: input of strangers creates no series.

use http::{Method, StatusCode};

use crate::lab::Lab;
use crate::lab::http1::{exchange, models};

/// Series that the first request of each outcome adds. Input of a stranger must add none.
const MORE: usize = 60;

async fn count(lab: &Lab) -> usize {
    let page = lab.operations().ask(Method::GET, "/metrics", "").await;
    assert_eq!(page.status, StatusCode::OK);
    page.text().lines().filter(|line| !line.starts_with('#')).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn random_models_paths_methods_and_keys_make_no_series() {
    let lab = Lab::here().await;
    let client = lab.client();
    assert_eq!(client.chat(&crate::lab::http1::body("m", false)).await.status, StatusCode::OK);
    let before = count(&lab).await;
    for i in 0..1000 {
        let model = client.chat(&format!(r#"{{"model":"random-{i}","messages":[]}}"#)).await;
        let path = client.ask(Method::GET, &format!("/v1/random-{i}"), "").await;
        let key = client.with_key(&format!("random-{i}")).chat("{}").await;
        let statuses = [model.status, path.status, key.status];
        assert_eq!(statuses, [StatusCode::NOT_FOUND, StatusCode::NOT_FOUND, StatusCode::UNAUTHORIZED]);
    }
    for i in 0..100 {
        let text = String::from_utf8(models("Connection: close\r\n")).expect("UTF-8");
        let heard = exchange(lab.clients, text.replace("GET", &format!("RANDOM{i}"))).await;
        assert_eq!(heard.statuses(), [405], "{heard:?}");
    }
    let after = count(&lab).await;
    assert!(after <= before + MORE, "{before} series became {after}");
}
