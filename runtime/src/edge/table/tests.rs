use tokio::time::Instant;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn bounds(connections: usize, per_address: usize) -> Bounds {
    Bounds {
        connections,
        connections_per_address: per_address,
        head: 10 * SECOND,
        idle: 75 * SECOND,
        stranger_idle: 10 * SECOND,
        write_stall: 60 * SECOND,
    }
}

fn table(connections: usize, per_address: usize) -> Arc<Table> {
    let table = Table::new("test", bounds(connections, per_address), EdgeMetrics::default());
    tokio::spawn(sweep(Arc::downgrade(&table)));
    table
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// When and why it was cut, in whole seconds from now.
async fn cut_after(connection: &Arc<Connection>, limit: u64) -> Option<(u64, Cut)> {
    for second in 0..=limit {
        if let Some(why) = connection.ends_for() {
            return Some((second, why));
        }
        tokio::time::sleep(SECOND).await;
    }
    None
}

#[tokio::test(start_paused = true)]
async fn whoever_sends_no_head_is_cut_in_time_whatever_it_does() {
    let table = table(10, 10);
    let silent = table.admit(address("10.0.0.1")).expect("room");
    let trickles = table.admit(address("10.0.0.1")).expect("room");
    for _ in 0..9 {
        tokio::time::sleep(SECOND).await;
        trickles.connection().head_began();
    }
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(silent.connection().was_cut(), Some(Cut::Head));
    assert_eq!(trickles.connection().was_cut(), Some(Cut::Head), "bytes move no clock");
}

#[tokio::test(start_paused = true)]
async fn idle_connections_have_the_time_of_who_they_are() {
    let table = table(10, 10);
    let (stranger, known) =
        (table.admit(address("10.0.0.1")).expect("room"), table.admit(address("10.0.0.1")).expect("room"));
    known.connection().trust();
    let (one, other) = (stranger.connection().begin(), known.connection().begin());
    tokio::time::sleep(200 * SECOND).await;
    assert!(stranger.connection().ends_for().is_none(), "a request that runs is not cut");
    drop((one, other));
    assert_eq!(cut_after(stranger.connection(), 20).await, Some((11, Cut::Idle)));
    assert_eq!(cut_after(known.connection(), 100).await, Some((65, Cut::Idle)));
}

#[tokio::test(start_paused = true)]
async fn a_later_head_has_its_own_time() {
    let table = table(10, 10);
    let open = table.admit(address("10.0.0.1")).expect("room");
    open.connection().trust();
    drop(open.connection().begin());
    tokio::time::sleep(30 * SECOND).await;
    open.connection().head_began();
    assert_eq!(cut_after(open.connection(), 20).await, Some((11, Cut::Head)));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_nothing_is_cut_and_one_that_takes_a_little_is_not() {
    let table = table(10, 10);
    let (stalled, slow) =
        (table.admit(address("10.0.0.1")).expect("room"), table.admit(address("10.0.0.1")).expect("room"));
    let _busy = (stalled.connection().begin(), slow.connection().begin());
    stalled.connection().write_waits(true);
    for _ in 0..4 {
        slow.connection().write_waits(true);
        tokio::time::sleep(30 * SECOND).await;
        slow.connection().write_waits(false);
    }
    assert_eq!(stalled.connection().was_cut(), Some(Cut::Stalled));
    assert_eq!(slow.connection().was_cut(), None);
}

#[tokio::test(start_paused = true)]
async fn where_there_is_no_room_the_longest_idle_goes_strangers_first_and_the_busy_stay() {
    let table = table(4, 4);
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(table.admit(address("10.0.0.1")).expect("room"));
        tokio::time::sleep(SECOND).await;
    }
    // By age: busy, identified and idle, two strangers.
    let _busy = open[0].connection().begin();
    open[1].connection().trust();
    let cut = |k: usize, open: &[Open]| open[k].connection().ends_for() == Some(Cut::Evicted);
    let fifth = table.admit(address("10.0.0.2")).expect("the oldest stranger makes room");
    assert_eq!([0, 1, 2, 3].map(|k| cut(k, &open)), [false, false, true, false]);
    let _busy = (_busy, fifth.connection().begin());
    let sixth = table.admit(address("10.0.0.2")).expect("the next stranger");
    let _busy = (_busy, sixth.connection().begin());
    assert!(cut(3, &open) && !cut(1, &open));
    let seventh = table.admit(address("10.0.0.2")).expect("at last the known one");
    let _busy = (_busy, seventh.connection().begin());
    assert!(cut(1, &open) && !cut(0, &open));
    assert!(table.admit(address("10.0.0.2")).is_none(), "all are busy");
    assert_eq!(table.metrics.refused("test"), 1);
    drop(open);
    assert!(table.admit(address("10.0.0.2")).is_some());
}

#[tokio::test(start_paused = true)]
async fn an_address_makes_room_for_itself_and_not_at_the_cost_of_others() {
    let table = table(100, 2);
    let other = table.admit(address("2001:db8:1::1")).expect("room");
    let first = table.admit(address("2001:db8::1")).expect("room");
    tokio::time::sleep(SECOND).await;
    let second = table.admit(address("2001:db8::2")).expect("room");
    let third = table.admit(address("2001:db8::3")).expect("its oldest goes");
    assert_eq!(first.connection().ends_for(), Some(Cut::Evicted));
    let _busy = (second.connection().begin(), third.connection().begin());
    assert!(table.admit(address("2001:db8::4")).is_none());
    assert!(other.connection().ends_for().is_none());
    drop((first, second, third, other));
    assert_eq!((table.len(), lock(&table.inner).addresses.len()), (0, 0), "who has none is forgotten");
}

#[test]
fn a_network_of_ipv6_counts_as_one_and_mapped_addresses_as_ipv4() {
    let address = |text: &str| household(address(text));
    assert_eq!(address("2001:db8::1"), address("2001:db8::ffff:1"));
    assert_ne!(address("2001:db8::1"), address("2001:db8:0:1::1"));
    assert_eq!(address("::ffff:10.0.0.1"), address("10.0.0.1"));
}

#[tokio::test(start_paused = true)]
async fn a_request_is_cut_by_its_own_clock_and_the_connection_is_not() {
    let table = table(10, 10);
    let open = table.admit(address("10.0.0.1")).expect("room");
    let _busy = open.connection().begin();
    let (one, other) = (open.connection().stream(), open.connection().stream());
    one.clock.cut_at(Instant::now() + 3 * SECOND);
    other.clock.cut_at(Instant::now() + 3 * SECOND);
    other.clock.stop();
    tokio::time::sleep(4 * SECOND).await;
    assert!(one.clock.was_cut() && !other.clock.was_cut() && open.connection().was_cut().is_none());
    drop((one, other));
    assert_eq!(open.connection().open_streams(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_drain_closes_idle_connections_late_and_never_before_their_answer_has_left() {
    let table = table(10, 10);
    let open = table.admit(address("10.0.0.1")).expect("room");
    let connection = open.connection();
    let request = connection.begin();
    table.drain();
    assert!(connection.ends());
    tokio::time::sleep(5 * SECOND).await;
    drop(request);
    table.cut(Some(SECOND));
    assert_eq!(connection.ends_for(), None, "the end of its answer may not have left yet");
    connection.write_waits(true);
    tokio::time::sleep(2 * SECOND).await;
    table.cut(Some(SECOND));
    assert_eq!(connection.ends_for(), None, "it waits for its client");
    connection.write_waits(false);
    table.cut(Some(SECOND));
    assert_eq!(connection.ends_for(), Some(Cut::Drained));
}

#[tokio::test(start_paused = true)]
async fn who_makes_room_takes_none_until_it_stays_after_all() {
    let table = table(2, 2);
    let first = table.admit(address("10.0.0.1")).expect("room");
    tokio::time::sleep(SECOND).await;
    let _second = table.admit(address("10.0.0.1")).expect("room");
    let _third = table.admit(address("10.0.0.1")).expect("the first makes room");
    let counted = |table: &Table| lock(&table.inner).counted;
    assert_eq!((first.connection().take_asked_to_close(), counted(&table)), (Some(Cut::Evicted), 2));
    tokio::time::sleep(SECOND).await;
    assert_eq!(counted(&table), 3, "it had a request after all");
    let _fourth = table.admit(address("10.0.0.1")).expect("two make room");
    assert_eq!((counted(&table), table.len()), (2, 4));
}

#[tokio::test(start_paused = true)]
async fn one_that_writes_when_it_is_to_make_room_is_cut_at_once() {
    let table = table(1, 1);
    let open = table.admit(address("10.0.0.1")).expect("room");
    open.connection().write_waits(true);
    let _other = table.admit(address("10.0.0.1")).expect("it makes room");
    assert_eq!(open.connection().was_cut(), Some(Cut::Evicted), "its reader may never look");
}
