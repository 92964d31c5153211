//! One run: arrivals, gateways with the real balancing code and stale reports, engines.

use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;
use weir_gateway::routing::balance::{
    Balancer, Candidates, ChooseConfig, EjectConfig, EjectionStatus, Ejector, Measure, Pace, Policy, Sample,
    Usability, View, claim_probe, is_panic,
};

use super::backend::{Engine, SLOTS, Soonest, full_rate, share};
use crate::rng::Rng;

/// A gateway whose requests found no slot asks again after this time; one that frees a slot asks at once.
const ASK_AGAIN_S: f64 = 0.05;
/// The response time of a failing engine.
const FAIL_S: f64 = 0.005;
/// Tokens of output per unit of work.
const TOKENS_PER_WORK: f64 = 50.0;
/// The maximum of an engine's requests for its prefixes, as a multiple of the mean load.
pub(super) const BOUND: f64 = 1.25;
/// Tokens of every prompt.
const PROMPT_TOKENS: u64 = 64;
/// The share of its work that a request saves if its prefix is cached.
const CACHED_SHARE: f64 = 0.5;
/// Bounds of the work of one request, seconds alone on an engine of speed 1.
const WORK_MIN: f64 = 0.2;
const WORK_MAX: f64 = 30.0;

/// How requests are assigned to engines.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scheme {
    /// The gateway's own code, with reports of all gateways.
    Weir {
        policy: Policy,
        /// Whether the limiter counts slots for the cluster. Otherwise engines queue the excess.
        slots: bool,
    },
    /// The less loaded of two random engines, by this gateway's own requests.
    LeastRequestLocal,
    /// One queue that knows everything: the engine that serves the next request fastest.
    Ideal,
}

/// The scenario to simulate.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scenario {
    pub(super) scheme: Scheme,
    pub(super) gateways: usize,
    /// The load as a share of the engines' capacity with every slot taken.
    pub(super) load: f64,
    /// The age of a report when the next one comes, seconds.
    pub(super) report_s: f64,
    pub(super) requests: usize,
    pub(super) seed: u64,
    /// The number of prefixes; 0 for none.
    pub(super) prefixes: u64,
    /// One engine fails every request at once.
    pub(super) failing: bool,
    /// Whether gateways eject engines by their own observations.
    pub(super) ejection: bool,
}

/// The result.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    pub(super) waits_s: Vec<f64>,
    pub(super) slowdowns: Vec<f64>,
    pub(super) hits: u64,
    pub(super) prefixed: u64,
    /// The share of all attempts that went to the failing engine.
    pub(super) failing_share: f64,
    /// Requests placed by their prefix, and those of them that exceeded the bound of their engine: the gateway
    /// decides by a report that is up to one interval old.
    pub(super) affine: u64,
    pub(super) over_bound: u64,
}

struct Request {
    arrived: f64,
    work: f64,
    gateway: usize,
    prefix: Option<u64>,
    started: f64,
    engine: usize,
    /// The work on this engine.
    todo: f64,
}

struct Gateway {
    balancer: Balancer,
    ejector: Ejector<usize>,
    local: Vec<u32>,
    /// The requests of all other gateways at the last report.
    elsewhere: Vec<u32>,
    waiting: VecDeque<usize>,
    asks: bool,
    rng: Rng,
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Arrival,
    /// The engine's next request ends, if the version is still this one.
    End(usize, u64),
    /// A request at the failing engine gets its error.
    Failed(usize),
    Report,
    Ask(usize),
}

struct Sim {
    scenario: Scenario,
    engines: Vec<Engine>,
    gateways: Vec<Gateway>,
    requests: Vec<Request>,
    central: VecDeque<usize>,
    events: BinaryHeap<(Soonest, u64, usize)>,
    kinds: Vec<Event>,
    now: f64,
    epoch: Instant,
    rng: Rng,
    out: Outcome,
    tries: u64,
    failing_tries: u64,
}

/// Eight engines of the same weight, two of them half as fast without the operator's knowledge.
const SPEEDS: [f64; 8] = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5];
/// The one that fails.
const FAILING: usize = 0;

fn unit(rng: &mut Rng) -> f64 {
    (rng.next() >> 11) as f64 / (1u64 << 53) as f64
}

/// Log-normal with a median of 1 s.
fn work(rng: &mut Rng) -> f64 {
    let (u, v) = (1.0 - unit(rng), unit(rng));
    let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
    normal.exp().clamp(WORK_MIN, WORK_MAX)
}

fn mean_work() -> f64 {
    let mut rng = Rng::new(1, 1);
    (0..200_000).map(|_| work(&mut rng)).sum::<f64>() / 200_000.0
}

/// Runs a scenario to the end of its last request.
pub(super) fn run(scenario: &Scenario) -> Outcome {
    let engines = SPEEDS.iter().map(|speed| Engine::new(*speed)).collect();
    let gateway = |number| Gateway {
        balancer: Balancer::default(),
        ejector: Ejector::new(EjectConfig::default()),
        local: vec![0; SPEEDS.len()],
        elsewhere: vec![0; SPEEDS.len()],
        waiting: VecDeque::new(),
        asks: false,
        rng: Rng::new(scenario.seed, 100 + number as u64),
    };
    let mut sim = Sim {
        scenario: *scenario,
        engines,
        gateways: (0..scenario.gateways).map(gateway).collect(),
        requests: Vec::with_capacity(scenario.requests),
        central: VecDeque::new(),
        events: BinaryHeap::new(),
        kinds: Vec::new(),
        now: 0.0,
        epoch: Instant::now(),
        rng: Rng::new(scenario.seed, 0),
        out: Outcome::default(),
        tries: 0,
        failing_tries: 0,
    };
    sim.simulate();
    sim.out.failing_share = sim.failing_tries as f64 / sim.tries.max(1) as f64;
    sim.out
}

impl Sim {
    fn simulate(&mut self) {
        // The load is that without a cache, although requests with a cached prefix save work.
        let serving = SPEEDS.iter().enumerate().filter(|(i, _)| !(self.scenario.failing && *i == FAILING));
        let capacity = serving.map(|(_, speed)| speed).sum::<f64>() * full_rate() / mean_work();
        let gap = 1.0 / (self.scenario.load * capacity);
        self.at(0.0, Event::Arrival);
        self.at(self.scenario.report_s, Event::Report);
        while let Some((Soonest(time), _, kind)) = self.events.pop() {
            self.now = time;
            match self.kinds[kind] {
                Event::Arrival => {
                    self.arrive();
                    if self.requests.len() < self.scenario.requests {
                        let next = -gap * (1.0 - unit(&mut self.rng)).ln();
                        self.at(self.now + next, Event::Arrival);
                    }
                }
                Event::End(engine, version) if self.engines[engine].version == version => self.end(engine),
                Event::End(..) => {}
                Event::Failed(request) => self.failed(request),
                Event::Report => self.report(),
                Event::Ask(gateway) => {
                    self.gateways[gateway].asks = false;
                    self.ask(gateway);
                }
            }
            if self.out.waits_s.len() == self.scenario.requests {
                return;
            }
        }
    }

    fn at(&mut self, time: f64, event: Event) {
        // Events of the same time in the order of their creation.
        let number = u64::MAX - self.kinds.len() as u64;
        self.events.push((Soonest(time), number, self.kinds.len()));
        self.kinds.push(event);
    }

    fn instant(&self) -> Instant {
        self.epoch + Duration::from_secs_f64(self.now)
    }

    fn arrive(&mut self) {
        let gateway = (self.rng.next() % self.gateways.len() as u64) as usize;
        let prefixes = self.scenario.prefixes;
        let prefix = (prefixes > 0).then(|| self.rng.next() % prefixes.max(1));
        let work = work(&mut self.rng);
        let request = self.requests.len();
        self.requests.push(Request {
            arrived: self.now,
            work,
            gateway,
            prefix,
            started: self.now,
            engine: 0,
            todo: work,
        });
        match self.scenario.scheme {
            Scheme::Ideal => {
                self.central.push_back(request);
                self.serve_central();
            }
            _ => self.offer(request),
        }
    }

    /// Sends the requests of the one queue while there are slots.
    fn serve_central(&mut self) {
        while let Some(&request) = self.central.front() {
            let fastest = |engine: &Engine| engine.speed * share(engine.busy() + 1);
            let free = self.engines.iter().enumerate().filter(|(_, e)| e.busy() < SLOTS);
            let best = free.max_by(|(_, a), (_, b)| fastest(a).total_cmp(&fastest(b))).map(|(i, _)| i);
            let Some(best) = best else { return };
            self.central.pop_front();
            self.start(request, best);
        }
    }

    /// A gateway chooses an engine for a new request.
    fn offer(&mut self, request: usize) {
        let gateway = self.requests[request].gateway;
        match self.scenario.scheme {
            Scheme::Weir { slots: true, .. } if !self.gateways[gateway].waiting.is_empty() => {
                self.gateways[gateway].waiting.push_back(request);
            }
            Scheme::Weir { slots: true, .. } => {
                if !self.place(request) {
                    self.gateways[gateway].waiting.push_back(request);
                    self.ask_later(gateway);
                }
            }
            Scheme::Weir { slots: false, .. } => {
                if let Some(first) = self.order(request).0.first() {
                    self.enqueue(request, first.index);
                }
            }
            Scheme::LeastRequestLocal => {
                let local = &self.gateways[gateway].local;
                let (a, b) = (self.rng.next() as usize % local.len(), self.rng.next() as usize % local.len());
                let pick = if local[b] < local[a] { b } else { a };
                self.enqueue(request, pick);
            }
            Scheme::Ideal => {}
        }
    }

    /// The candidates in order of preference, and the number of the first one's probe if it is on probation.
    fn order(&mut self, request: usize) -> (Candidates, Option<u64>) {
        let Scheme::Weir { policy, .. } = self.scenario.scheme else { return (Candidates::new(), None) };
        let now = self.instant();
        let Request { gateway, prefix, .. } = self.requests[request];
        let gateway = &mut self.gateways[gateway];
        let view = |index: usize| View {
            id: index as u64 + 1,
            weight: 100.0,
            max_concurrency: SLOTS as u32,
            held_back: 0,
            in_flight: f64::from(gateway.local[index] + gateway.elsewhere[index]),
            local: gateway.local[index],
            health: 1.0,
            rank: 0,
            usability: match gateway.ejector.status(&index, now) {
                EjectionStatus::Open | EjectionStatus::Probe => Usability::Healthy,
                EjectionStatus::Ejected(_) | EjectionStatus::Busy(_) => Usability::Unhealthy,
            },
        };
        let views: Vec<View> = (0..SPEEDS.len()).map(view).collect();
        let config = ChooseConfig { policy, ..ChooseConfig::default() };
        let (balancer, rng) = (&mut gateway.balancer, &mut gateway.rng);
        let mut places = balancer.order(&config, &views, prefix, now, || unit(rng));
        let panic = is_panic(&config, &views);
        let probe = claim_probe(&mut gateway.ejector, &mut places, |index| index, panic, now);
        (places, probe)
    }

    /// Takes the first candidate with a slot, as the limiter's script does. Returns false if there is none.
    fn place(&mut self, request: usize) -> bool {
        let (places, probe) = self.order(request);
        let all = (0..SPEEDS.len()).map(|i| self.present(i)).sum::<usize>();
        let free = |p: &&weir_gateway::routing::balance::Candidate| {
            let bound = p
                .bound
                .map_or(u64::MAX, |b| (u64::from(b.millionths) * (all as u64 + 1)).div_ceil(1_000_000));
            let present = self.present(p.index) as u64;
            present < u64::from(p.slots).min(bound.max(1))
        };
        let place = places.iter().find(free).copied();
        let gateway = &mut self.gateways[self.requests[request].gateway];
        if let (Some(number), Some(first)) = (probe, places.first())
            && place.is_none_or(|place| place.index != first.index)
        {
            gateway.ejector.abandon_probe(&first.index, number);
        }
        let Some(place) = place else { return false };
        if place.index != places[0].index {
            gateway.balancer.reassign(places[0].index as u64 + 1, place.index as u64 + 1);
        }
        if place.bound.is_some() {
            let bound = (BOUND * (all as f64 + 1.0) / SPEEDS.len() as f64).ceil();
            self.out.affine += 1;
            self.out.over_bound += u64::from(self.present(place.index) as f64 + 1.0 > bound);
        }
        self.start(request, place.index);
        true
    }

    fn present(&self, engine: usize) -> usize {
        self.engines[engine].present()
    }

    /// Sends it to an engine, which queues the excess.
    fn enqueue(&mut self, request: usize, engine: usize) {
        if self.engines[engine].busy() < SLOTS {
            self.start(request, engine);
        } else {
            self.gateways[self.requests[request].gateway].local[engine] += 1;
            self.engines[engine].queue.push_back(request);
        }
    }

    fn start(&mut self, request: usize, engine: usize) {
        self.gateways[self.requests[request].gateway].local[engine] += 1;
        self.begin(request, engine);
    }

    /// The engine starts to work.
    fn begin(&mut self, request: usize, engine: usize) {
        let hit = match self.requests[request].prefix {
            Some(prefix) => {
                let hit = self.engines[engine].recall(prefix);
                self.out.prefixed += 1;
                self.out.hits += u64::from(hit);
                hit
            }
            None => false,
        };
        let of = &mut self.requests[request];
        (of.started, of.engine) = (self.now, engine);
        of.todo = of.work * if hit { 1.0 - CACHED_SHARE } else { 1.0 };
        self.tries += 1;
        if self.scenario.failing && engine == FAILING {
            self.failing_tries += 1;
            self.at(self.now + FAIL_S, Event::Failed(request));
            return;
        }
        let todo = of.todo;
        self.engines[engine].start(request, todo, self.now);
        self.schedule(engine);
    }

    fn schedule(&mut self, engine: usize) {
        if let Some(end) = self.engines[engine].next_end() {
            self.at(end, Event::End(engine, self.engines[engine].version));
        }
    }

    fn end(&mut self, engine: usize) {
        let Some(request) = self.engines[engine].finish(self.now) else { return };
        self.schedule(engine);
        let now = self.instant();
        let of = &self.requests[request];
        let alone = of.work / share(1);
        self.out.waits_s.push(of.started - of.arrived);
        self.out.slowdowns.push((self.now - of.arrived) / alone);
        let sample = Sample {
            measure: Measure::Unary,
            took: Duration::from_secs_f64(self.now - of.started),
            prompt_tokens: PROMPT_TOKENS,
            output_tokens: (of.todo * TOKENS_PER_WORK) as u64,
        };
        let number = of.gateway;
        let gateway = &mut self.gateways[number];
        gateway.local[engine] -= 1;
        gateway.balancer.add(engine as u64 + 1, &sample, now);
        gateway.ejector.succeeded(&engine, now);
        if let Some(next) = self.engines[engine].queue.pop_front() {
            self.begin(next, engine);
        }
        self.serve_central();
        self.ask(number);
    }

    /// The failing engine answered; the request is tried again from the start.
    fn failed(&mut self, request: usize) {
        let now = self.instant();
        let Request { gateway: number, engine, started, .. } = self.requests[request];
        let sample = Sample {
            measure: Measure::Unary,
            took: Duration::from_secs_f64(self.now - started),
            prompt_tokens: PROMPT_TOKENS,
            output_tokens: 0,
        };
        let gateway = &mut self.gateways[number];
        gateway.local[engine] -= 1;
        gateway.balancer.speeds.add_failure(engine as u64 + 1, &sample, now);
        if self.scenario.ejection {
            gateway.ejector.failed(&engine, SPEEDS.len(), now);
        }
        // The client gets the error and does not return: the bench counts the engine's requests.
        self.out.waits_s.push(started - self.requests[request].arrived);
        self.ask(number);
    }

    /// Every gateway learns the requests of the others, and the speeds that they measured.
    fn report(&mut self) {
        self.report_speeds();
        let all: Vec<u32> =
            (0..SPEEDS.len()).map(|e| self.gateways.iter().map(|g| g.local[e]).sum()).collect();
        for gateway in &mut self.gateways {
            gateway.elsewhere = all.iter().zip(&gateway.local).map(|(all, own)| all - own).collect();
        }
        self.at(self.now + self.scenario.report_s, Event::Report);
    }

    /// As the control plane computes it: the sum of all, less the gateway's own report.
    fn report_speeds(&mut self) {
        let now = self.instant();
        let paces = |gateway: &Gateway| -> HashMap<u64, Pace> {
            let paces = gateway.balancer.speeds.paces(now);
            paces.filter(|(_, m, _)| *m == Measure::Unary).map(|(id, _, pace)| (id, pace)).collect()
        };
        let all: Vec<HashMap<u64, Pace>> = self.gateways.iter().map(paces).collect();
        let sums = |pace: &Pace| {
            let square = pace.variance + pace.mean * pace.mean;
            [pace.count, pace.count * pace.mean, pace.count * square]
        };
        let mut total: HashMap<u64, [f64; 3]> = HashMap::new();
        for (id, pace) in all.iter().flatten() {
            let sum = total.entry(*id).or_default();
            sum.iter_mut().zip(sums(pace)).for_each(|(sum, own)| *sum += own);
        }
        for (gateway, own) in self.gateways.iter_mut().zip(&all) {
            for (id, sum) in &total {
                let own = own.get(id).map_or([0.0; 3], sums);
                let [count, values, squares] = [0, 1, 2].map(|i| sum[i] - own[i]);
                if count > 0.1 {
                    let mean = values / count;
                    let variance = (squares / count - mean * mean).max(0.0);
                    let pace = Pace { count, mean, variance };
                    gateway.balancer.speeds.set_others(*id, Measure::Unary, pace, now);
                }
            }
        }
    }

    /// The head of a gateway's queue asks for a slot, and the following requests while there are slots.
    fn ask(&mut self, gateway: usize) {
        while let Some(&head) = self.gateways[gateway].waiting.front() {
            if !self.place(head) {
                self.ask_later(gateway);
                return;
            }
            self.gateways[gateway].waiting.pop_front();
        }
    }

    fn ask_later(&mut self, gateway: usize) {
        if !std::mem::replace(&mut self.gateways[gateway].asks, true) {
            self.at(self.now + ASK_AGAIN_S, Event::Ask(gateway));
        }
    }
}
