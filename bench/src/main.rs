//! `weir-bench`: each claim about speed and accuracy as one command that measures it.
//!
//! `cargo run --profile dist -p weir-bench -- NAME` prints a table, with `--output json` one JSON object. Everything runs
//! on loopback, is bounded in time and number, and ends by itself. The processes under test are this binary in
//! another role ([`roles`]), real `redis-server`s, and nginx and haproxy where they are installed.

mod accuracy;
mod balance;
mod edge;
mod failover;
mod fanout;
mod fleet;
mod guide_table;
mod instructions;
mod limiter;
mod load;
mod machine;
mod outage;
mod partition;
mod pools;
mod process;
mod proxies;
mod proxy;
mod redis_server;
mod report;
mod resources;
mod rng;
mod roles;
mod scale;
mod shares;
mod stats;
mod store;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio_util::sync::CancellationToken;

use crate::report::{Output, Report};

/// Measures what Weir costs and whether it keeps its promises.
#[derive(Debug, Parser)]
#[command(name = "weir-bench", version = weir_runtime::version())]
struct Cli {
    /// A table for people or JSON for programs
    #[arg(long, global = true, value_enum, default_value = "table")]
    output: Output,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// What a proxy costs: direct, nginx, haproxy, Weir without and with limits in Redis
    Proxy(proxy::ProxyArgs),
    /// What each step of load balancing brings: the guide's table, measured
    GuideTable(guide_table::GuideTableArgs),
    /// Full admissions per second and per Redis core, and what admission adds to a request
    Limiter(limiter::LimiterArgs),
    /// Whether limits hold to the request over four gateways while things break
    Accuracy(accuracy::AccuracyArgs),
    /// What clients notice while Redis is away under load, and whether limits hold meanwhile
    Outage(outage::OutageArgs),
    /// What a request and a chunk of a stream cost in instructions and allocations, counted by callgrind
    Instructions(instructions::InstructionsArgs),
    /// Which balancing policy keeps requests from waiting, simulated with the gateway's own code
    Balance(balance::BalanceArgs),
    /// How long until a broken backend is left alone, and what clients notice
    Failover(failover::FailoverArgs),
    /// How long until every gateway of a large fleet has a change, and what that costs the control plane
    Fanout(fanout::FanoutArgs),
    /// Whether a backend that only some gateways can reach stays in use for the others
    Partition(partition::PartitionArgs),
    /// What slow clients, silent strangers and a broken log cost, and whether others are served meanwhile
    Edge(edge::EdgeArgs),
    /// What a request costs with few and with many backends in its pool
    Pools(pools::PoolsArgs),
    /// What a change costs with many API keys declared, and what the keys cost
    Scale(scale::ScaleArgs),
    /// Whether backends get their configured shares, their slots, and no needless probes
    Shares(shares::SharesArgs),
    /// A part of a bench, started by the bench itself
    #[command(hide = true)]
    Role {
        #[command(subcommand)]
        role: Box<roles::Role>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    raise_file_limit();
    let done = match cli.bench {
        Bench::Role { role } => roles::run(*role),
        bench => measure(bench).and_then(|report| Ok(report.print(cli.output)?)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weir-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One thread is enough for the load generator, and leaves the other cores to what is measured.
fn measure(bench: Bench) -> anyhow::Result<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let bench = async {
        match bench {
            Bench::Proxy(args) => proxy::run(&args).await,
            Bench::Limiter(args) => limiter::run(&args).await,
            Bench::Accuracy(args) => accuracy::run(&args).await,
            Bench::Outage(args) => outage::run(&args).await,
            Bench::GuideTable(args) => guide_table::run(&args).await,
            Bench::Instructions(args) => instructions::run(&args).await,
            Bench::Balance(args) => Ok(balance::run(&args, machine::describe())),
            Bench::Failover(args) => failover::run(&args).await,
            Bench::Fanout(args) => fanout::run(&args).await,
            Bench::Partition(args) => partition::run(&args).await,
            Bench::Edge(args) => edge::run(&args).await,
            Bench::Pools(args) => pools::run(&args).await,
            Bench::Scale(args) => scale::run(&args).await,
            Bench::Shares(args) => shares::run(&args).await,
            Bench::Role { .. } => anyhow::bail!("a role is not a bench"),
        }
    };
    runtime.block_on(async {
        let (shutdown, force) = (CancellationToken::new(), CancellationToken::new());
        tokio::spawn(weir_runtime::shutdown_on_signals(shutdown.clone(), force));
        tokio::select! {
            done = bench => done,
            // Dropping the bench ends every process it started.
            () = shutdown.cancelled() => anyhow::bail!("interrupted"),
        }
    })
}

/// Thousands of streams need as many files as the system allows; child processes inherit the limit.
fn raise_file_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Without it a bench that needs more fails with "too many open files".
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
