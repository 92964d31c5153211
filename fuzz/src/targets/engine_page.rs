use weir_gateway::probe::fuzzing::engine;

/// The cache is a share, comments say nothing, and a page that is there twice has the same cache and twice the queue.
pub(crate) fn run(data: &[u8]) {
    let page = String::from_utf8_lossy(data);
    let (cache, queue) = engine(&page);
    assert!(cache.is_none_or(|cache| (0.0..=1.0).contains(&cache)), "{cache:?}");
    let twice = engine(&format!("{page}\n# vllm:num_requests_waiting 7\n{page}"));
    assert_eq!(twice, (cache, queue.map(|queue| queue.saturating_mul(2))));
}
