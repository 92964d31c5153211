//! The `mock-llm` binary: flags and environment to [`Config`], signals to shutdown.

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use mock_llm::{Config, Faults, Server};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Exit code of a wrong flag or setting.
const USAGE: u8 = 2;

/// Simulated OpenAI-compatible LLM server with slots, timing and faults that can be switched at run time.
///
/// Faults: POST, GET, DELETE /admin/faults. Counters: GET /admin/stats, GET /metrics. There is no access control:
/// everyone who reaches the port can switch faults.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Args {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, env = "MOCK_LLM_LISTEN", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// Model name to serve; repeat, or separate by commas
    #[arg(long = "model", env = "MOCK_LLM_MODEL", value_delimiter = ',', default_values_t = Config::default().models)]
    models: Vec<String>,
    /// Region told in the header x-mock-region
    #[arg(long, env = "MOCK_LLM_REGION", default_value_t = Config::default().region)]
    region: String,
    /// Name told in the header x-mock-instance, and as req-NAME in request-id [default: mock-<port>]
    #[arg(long, env = "MOCK_LLM_INSTANCE", default_value = "", hide_default_value = true)]
    instance: String,
    /// Prompt tokens read per second; 0 is no delay
    #[arg(long, env = "MOCK_LLM_PREFILL_TOKENS_PER_S", default_value_t = Config::default().prefill_tokens_per_s)]
    prefill_tokens_per_s: f64,
    /// Tokens written per second and answer; 0 is no delay
    #[arg(long, env = "MOCK_LLM_DECODE_TOKENS_PER_S", default_value_t = Config::default().decode_tokens_per_s)]
    decode_tokens_per_s: f64,
    /// Answers generated at the same time
    #[arg(long, env = "MOCK_LLM_SLOTS", default_value_t = Config::default().slots)]
    slots: usize,
    /// Requests waiting for a slot; one more is answered 429
    #[arg(long, env = "MOCK_LLM_QUEUE", default_value_t = Config::default().queue)]
    queue: usize,
    /// Spread of the time of each token, a fraction from 0.0 to 1.0
    #[arg(long, env = "MOCK_LLM_JITTER", default_value_t = Config::default().jitter)]
    jitter: f64,
    /// Seed of jitter, fault probabilities and ids
    #[arg(long, env = "MOCK_LLM_SEED", default_value_t = Config::default().seed)]
    seed: u64,
    /// Time the server reports that it is loading, with unit (ms, s, m)
    #[arg(long, env = "MOCK_LLM_COLD_START", default_value = "0s", value_parser = duration)]
    cold_start: Duration,
    /// Tokens of an answer when the request asks for more or does not say
    #[arg(long, env = "MOCK_LLM_OUTPUT_TOKENS", default_value_t = Config::default().output_tokens)]
    output_tokens: u64,
    /// Bytes of text in each token event; 0 is natural words
    #[arg(long, env = "MOCK_LLM_CHUNK_BYTES", default_value_t = Config::default().chunk_bytes)]
    chunk_bytes: usize,
    /// Numbers in an embedding when the request does not say
    #[arg(long, env = "MOCK_LLM_EMBEDDING_DIMENSIONS", default_value_t = Config::default().embedding_dimensions)]
    embedding_dimensions: usize,
    /// Serve models that embed alone: other endpoints answer 400
    #[arg(long, env = "MOCK_LLM_EMBEDS_ONLY")]
    embeds_only: bool,
    /// Connections open at once
    #[arg(long, env = "MOCK_LLM_CONNECTIONS_MAX", default_value_t = Config::default().connections_max)]
    connections_max: usize,
    /// Time open answers get after SIGTERM or SIGINT, with unit (ms, s, m)
    #[arg(long, env = "MOCK_LLM_DRAIN", default_value = "5s", value_parser = duration)]
    drain: Duration,
    /// Faults from the start, as the JSON of POST /admin/faults
    #[arg(long, env = "MOCK_LLM_FAULTS", default_value = "{}", value_parser = faults)]
    faults: Faults,
}

impl From<Args> for Config {
    fn from(args: Args) -> Self {
        Self {
            models: args.models,
            region: args.region,
            instance: args.instance,
            prefill_tokens_per_s: args.prefill_tokens_per_s,
            decode_tokens_per_s: args.decode_tokens_per_s,
            slots: args.slots,
            queue: args.queue,
            jitter: args.jitter,
            seed: args.seed,
            cold_start: args.cold_start,
            output_tokens: args.output_tokens,
            chunk_bytes: args.chunk_bytes,
            embedding_dimensions: args.embedding_dimensions,
            embeds_only: args.embeds_only,
            connections_max: args.connections_max,
            drain: args.drain,
            faults: args.faults,
        }
    }
}

fn faults(text: &str) -> Result<Faults, serde_json::Error> {
    serde_json::from_str(text)
}

/// Parses a duration such as `250ms`, `1.5s` or `2m`.
fn duration(text: &str) -> Result<Duration, &'static str> {
    const USE: &str = "use a number with unit ms, s or m, such as 250ms";
    let number = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit_s = match &text[number.len()..] {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        _ => return Err(USE),
    };
    let seconds = number.parse::<f64>().map_err(|_| USE)? * unit_s;
    Duration::try_from_secs_f64(seconds).map_err(|_| USE)
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = std::env::var("RUST_LOG").ok().and_then(|filter| filter.parse().ok());
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .finish()
        .with(filter.unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO)))
        .init();
    let listen = args.listen;
    let config = Config::from(args);
    if let Err(error) = config.validate() {
        complain(&error);
        return ExitCode::from(USAGE);
    }
    match run(listen, config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Prints why the process fails. It fails as well if nobody reads the message.
fn complain(reason: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "mock-llm: {reason}");
}

fn run(listen: SocketAddr, config: Config) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let models = config.models.join(", ");
        let server = Server::bind(listen, config).await.with_context(|| format!("listen on {listen}"))?;
        if !listen.ip().is_loopback() {
            tracing::warn!(%listen, "listening beyond loopback without access control, also for /admin/faults");
        }
        // The caller of a server on port 0 reads the port here. A closed stdout is no reason to stop.
        let _ = writeln!(std::io::stdout(), "mock-llm serves {models} on http://{}", server.local_addr());
        let shutdown = CancellationToken::new();
        let serving = server.run(shutdown.clone());
        let stopping = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            shutdown.cancel();
        };
        tokio::join!(serving, stopping);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent_and_default_to_the_library() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
        assert_eq!(Config::from(Args::parse_from(["mock-llm"])), Config::default());
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(["5", "s", "-1s", "1h", "", "1é"].iter().all(|text| duration(text).is_err()));
    }
}
