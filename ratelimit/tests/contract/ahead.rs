//! Quota taken ahead, by several processes of one store.

use std::time::Duration;

use smallvec::smallvec;
use weir_ratelimit::*;

use crate::harness::*;

/// A limit of so many requests in which a fifth is set aside.
fn hot(requests: u64) -> Scopes {
    let mut limits =
        limited("acme", Kind::Requests, bucket(requests - requests / 5, 0, Duration::from_secs(60)));
    limits.prefetch[Kind::Requests as usize] = requests / 5;
    smallvec![limits]
}

/// Four processes ask at once for more than there is: what is not set aside is admitted, to the request, whatever was
/// taken ahead by whom and given back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_the_limit_by_four_processes_that_take_ahead() {
    let server = Server::start().await;
    let scopes = hot(5_000);
    let mut tasks = tokio::task::JoinSet::new();
    let mut processes = Vec::new();
    for _ in 0..4 {
        let limiter = AnyLimiter::from(server.limiter().await);
        processes.push(limiter.clone());
        let scopes = scopes.clone();
        tasks.spawn(async move {
            let (mut admitted, mut refused_since) = (0, None);
            loop {
                let decision = limiter.acquire(&call(scopes.clone())).await.expect("decided");
                if granted(&decision) {
                    (admitted, refused_since) = (admitted + 1, None);
                }
                // Until what others may hold has long been given back.
                let since = *refused_since.get_or_insert_with(tokio::time::Instant::now);
                if since.elapsed() > ahead::VALID * 3 {
                    return admitted;
                }
                if !granted(&decision) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        });
    }
    assert_eq!(tasks.join_all().await.into_iter().sum::<u64>(), 4_000);
    assert!(processes.iter().map(|process| process.ahead().decided).sum::<u64>() > 0);
    assert!(processes.iter().all(|process| process.ahead().held == [0; Kind::COUNT]));
}
