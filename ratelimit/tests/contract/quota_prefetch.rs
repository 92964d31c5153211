//! Quota taken ahead, by several processes of one store.

use std::time::Duration;

use weir_ratelimit::quota_prefetch::QuotaPrefetch;
use weir_ratelimit::*;

use crate::harness::*;

/// A limit of so many requests in which a fifth is set aside.
fn hot(requests: u64) -> Scopes {
    let mut limits =
        limited("acme", Kind::Requests, bucket(requests - requests / 5, 0, Duration::from_secs(60)));
    limits.prefetch[Kind::Requests as usize] = requests / 5;
    [limits].into()
}

/// Each asks for more than there is, until what others may hold has long been given back; all that was admitted.
async fn admitted_by(processes: &[QuotaPrefetch<AnyLimiter>], scopes: &Scopes) -> u64 {
    let mut tasks = tokio::task::JoinSet::new();
    for limiter in processes {
        let (limiter, scopes) = (limiter.clone(), scopes.clone());
        tasks.spawn(async move {
            let (mut admitted, mut refused_since) = (0, None);
            loop {
                let decision = limiter.acquire(&call(scopes.clone())).await.expect("decided");
                if granted(&decision) {
                    (admitted, refused_since) = (admitted + 1, None);
                }
                let since = *refused_since.get_or_insert_with(tokio::time::Instant::now);
                if since.elapsed() > quota_prefetch::VALID * 3 {
                    return admitted;
                }
                if !granted(&decision) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        });
    }
    tasks.join_all().await.into_iter().sum()
}

fn nothing_is_held(processes: &[QuotaPrefetch<AnyLimiter>]) {
    assert!(processes.iter().map(|process| process.status().decided).sum::<u64>() > 0);
    assert!(processes.iter().all(|process| process.status().held == [0; Kind::COUNT]));
}

/// Four processes ask at once for more than the capacity: exactly the part that is not set aside is admitted,
/// whichever process prefetched and gave back quota.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_the_limit_by_four_processes_that_take_ahead() {
    let server = Server::start().await;
    let mut processes = Vec::new();
    for _ in 0..4 {
        processes.push(ServiceStack::new(server.limiter().await.into()).limiter);
    }
    assert_eq!(admitted_by(&processes, &hot(5_000)).await, 4_000);
    nothing_is_held(&processes);
}

/// The same where the two bucket states of the limit share a hash slot and the tenant's limit is in another one,
/// which asks for each request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_the_limit_on_a_cluster() {
    let cluster = Cluster::start().await;
    let mut processes = Vec::new();
    for _ in 0..2 {
        processes.push(ServiceStack::new(cluster.limiter().await.into()).limiter);
    }
    let beside = limited("beside", Kind::Requests, bucket(10_000, 0, Duration::from_secs(60)));
    let scopes: Scopes = hot(1_000).iter().cloned().chain([beside]).collect();
    assert_eq!(admitted_by(&processes, &scopes).await, 800);
    nothing_is_held(&processes);
    let beside = processes[0].peek(&scopes[1..]).await.expect("peek");
    assert_eq!(beside[0].remaining, 10_000 - 800, "refused requests are not charged elsewhere");
}
