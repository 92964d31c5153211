//! What an answer used: the count that a backend reports, and the most that one answer can have used. A report beyond that
//! is not believed.
//!
//! A backend's `usage` decides what a tenant is charged and what the next requests reserve: a broken or hostile one could
//! close a tenant's limits with a single number. The bounds are what the request and the bytes of the answer allow:
//!
//! - Output: what the request allows (`max_tokens` and its like) for each choice, or the bytes of the answer where those
//!   are more, since a token has one byte at the least. Without `max_tokens` reasoning that is not sent may be
//!   longer than all bytes seen, so that the largest context there is counts for each choice.
//! - Prompt: the bytes of the request and what servers add to it. Where the model reads more than the body holds
//!   (images, files, earlier responses, the web), the largest context.
//!
//! A count beyond is not cut down to the bound, which is still far from the truth: the whole report is left aside and the
//! gateway's own count is used.

mod counts;

use super::request::{Request, RouteKind};

pub(in crate::api) use self::counts::{Counts, Field, Named, Part};

/// The largest context window that models are served with; what nothing else bounds is bounded by it. Models of 2 million
/// tokens are offered, larger ones exist in papers.
pub const CONTEXT_TOKENS_MAX: u64 = 2_000_000;
/// Tokens that a server may add to a prompt that it was sent whole: chat template, a preamble of its own, instructions
/// for tools. Known ones stay below 1000; a server that puts its own instructions before each prompt has more.
const ADDED_TOKENS_MAX: u64 = 32_768;
/// Tokens by which engines overshoot `max_tokens`: the end-of-text token, and the last step of speculative decoding.
pub(crate) const OVERSHOOT_TOKENS_MAX: u64 = 16;

/// Tokens as the backend counted them, in one form for all dialects: parts are inside their wholes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens read, those of the cache included; `None` when the backend does not say.
    pub prompt: Option<u64>,
    /// Tokens written, reasoning included; `None` when the backend does not say, as for embeddings.
    pub completion: Option<u64>,
    /// Of the prompt: tokens that came from the provider's cache.
    pub cache_read: u64,
    /// Of the prompt: tokens that were written to the provider's cache, for whatever time.
    pub cache_write: u64,
    /// Of the prompt: tokens of sound. May be cached ones.
    pub audio_in: u64,
    /// Of the prompt: tokens of images. May be cached ones.
    pub image_in: u64,
    /// Of the answer: tokens of reasoning.
    pub reasoning: u64,
    /// Of the answer: tokens of sound.
    pub audio_out: u64,
    /// Of the answer: tokens of images.
    pub image_out: u64,
}

impl Usage {
    /// Tokens of the prompt that were neither read from the cache nor written to it.
    pub fn input_uncached(&self) -> u64 {
        self.prompt.unwrap_or(0).saturating_sub(self.cache_read.saturating_add(self.cache_write))
    }

    /// The same with no part larger than its whole.
    #[must_use]
    fn within_wholes(mut self) -> Self {
        let (prompt, completion) = (self.prompt.unwrap_or(0), self.completion.unwrap_or(0));
        self.cache_read = self.cache_read.min(prompt);
        self.cache_write = self.cache_write.min(prompt - self.cache_read);
        for (part, whole) in [
            (&mut self.audio_in, prompt),
            (&mut self.image_in, prompt),
            (&mut self.reasoning, completion),
            (&mut self.audio_out, completion),
            (&mut self.image_out, completion),
        ] {
            *part = whole.min(*part);
        }
        self
    }

    /// What is known after a later report of the same answer. Counts are cumulative, so the last one of prompt and answer
    /// counts, and zero replaces none. A later report of the same prompt may lack the parts that an earlier one had.
    #[must_use]
    pub fn then(self, later: Self) -> Self {
        let known = |count: Option<u64>| count.unwrap_or(0) > 0;
        let mut merged = self;
        if known(later.prompt) || self.prompt.is_none() {
            let same = later.prompt == self.prompt;
            let part = |earlier: u64, later: u64| if same && later == 0 { earlier } else { later };
            merged.prompt = later.prompt;
            merged.cache_read = part(self.cache_read, later.cache_read);
            merged.cache_write = part(self.cache_write, later.cache_write);
            merged.audio_in = part(self.audio_in, later.audio_in);
            merged.image_in = part(self.image_in, later.image_in);
        }
        if known(later.completion) || self.completion.is_none() {
            let same = later.completion == self.completion;
            let part = |earlier: u64, later: u64| if same && later == 0 { earlier } else { later };
            merged.completion = later.completion;
            merged.reasoning = part(self.reasoning, later.reasoning);
            merged.audio_out = part(self.audio_out, later.audio_out);
            merged.image_out = part(self.image_out, later.image_out);
        }
        merged.within_wholes()
    }

    /// The same without zeros that are no counts: no prompt has no tokens, and no answer in which something was `written`.
    /// `None` when nothing is left.
    pub fn counted(mut self, written: bool) -> Option<Self> {
        self.prompt = self.prompt.filter(|count| *count > 0);
        self.completion = self.completion.filter(|count| *count > 0 || !written);
        (self.prompt.is_some() || self.completion.is_some()).then_some(self)
    }
}

/// Who counted the tokens of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The backend, both directions.
    Provider,
    /// The gateway, at least one direction.
    Counted,
    /// Nobody: what was reserved stands.
    Reserved,
}

impl Source {
    /// As metrics and logs name it.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Provider => "provider",
            Self::Counted => "counted",
            Self::Reserved => "reserved",
        }
    }
}

/// What a request is charged for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tokens {
    /// Tokens of the prompt, those of the cache included.
    pub prompt: u64,
    /// Tokens of the answer.
    pub completion: u64,
    /// Of the prompt: tokens that came from the provider's cache.
    pub cache_read: u64,
    /// Of the prompt: tokens that were written to the provider's cache.
    pub cache_write: u64,
    /// Who counted.
    pub source: Source,
}

impl Tokens {
    /// What the backend counted, and `prompt` and `completion` where it did not.
    pub fn of(usage: Option<Usage>, prompt: u64, completion: u64) -> Self {
        let usage = usage.unwrap_or_default();
        let source = match (usage.prompt, usage.completion) {
            (Some(_), Some(_)) => Source::Provider,
            (Some(_), None) if completion == 0 => Source::Provider,
            _ => Source::Counted,
        };
        Self {
            prompt: usage.prompt.unwrap_or(prompt),
            completion: usage.completion.unwrap_or(completion),
            cache_read: usage.cache_read,
            cache_write: usage.cache_write,
            source,
        }
    }

    /// What was reserved, none of it cached.
    pub const fn reserved(prompt: u64, completion: u64) -> Self {
        Self { prompt, completion, cache_read: 0, cache_write: 0, source: Source::Reserved }
    }
}

/// The most tokens that one answer can have used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsageBounds {
    /// Tokens of the prompt.
    pub prompt: u64,
    /// Tokens of the answer; zero for what writes none, such as embeddings. More when more bytes are seen.
    pub completion: u64,
}

/// A count that cannot be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Implausible {
    /// "input", "output", or "other" for a part or a sum of them.
    pub direction: &'static str,
    /// What the backend reported.
    pub reported: u64,
    /// The most that is possible.
    pub possible: u64,
}

impl Implausible {
    /// Every [`direction`](Self::direction).
    pub const DIRECTIONS: [&'static str; 3] = ["input", "output", "other"];
}

impl Default for UsageBounds {
    fn default() -> Self {
        Self { prompt: CONTEXT_TOKENS_MAX, completion: CONTEXT_TOKENS_MAX }
    }
}

impl UsageBounds {
    /// Those of a request whose body has so many bytes.
    pub fn of(asked: &Request<'_>, body_bytes: usize) -> Self {
        let sent = (body_bytes as u64).saturating_add(ADDED_TOKENS_MAX);
        let prompt = if asked.reads_more_than_body { sent.max(CONTEXT_TOKENS_MAX) } else { sent };
        // Tokens of a prediction that the model rejects are billed as output and not bounded by `max_tokens`.
        let rejected = if asked.predicts { body_bytes as u64 } else { 0 };
        let overshoot = OVERSHOOT_TOKENS_MAX.saturating_add(rejected);
        let stated = asked.max_output_tokens.map(|most| u64::from(most).saturating_add(overshoot));
        let completion = match asked.kind {
            RouteKind::Embeddings => 0,
            _ => stated
                .map_or(CONTEXT_TOKENS_MAX, |most| most.min(CONTEXT_TOKENS_MAX))
                .saturating_mul(u64::from(asked.choices).max(1)),
        };
        Self { prompt, completion }
    }

    /// Whether an answer of which `seen_bytes` were seen can have used so much. `most` is the largest number of the report
    /// that something is charged by: a part of the prompt or of the answer, or their sum. Numbers of other names (tokens of
    /// citations, sums over inner calls) have no bound and no effect.
    ///
    /// # Errors
    /// The count that cannot be true.
    pub fn check(&self, usage: Option<Usage>, most: u64, seen_bytes: u64) -> Result<(), Implausible> {
        let completion = if self.completion == 0 { 0 } else { self.completion.max(seen_bytes) };
        let usage = usage.unwrap_or_default();
        let counts = [
            ("input", usage.prompt.unwrap_or(0), self.prompt),
            ("output", usage.completion.unwrap_or(0), completion),
            ("other", most, self.prompt.saturating_add(completion)),
        ];
        match counts.into_iter().find(|(_, reported, possible)| reported > possible) {
            Some((direction, reported, possible)) => Err(Implausible { direction, reported, possible }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bounds(kind: RouteKind, body: &str) -> UsageBounds {
        let asked = Request::read(kind, body.as_bytes()).expect("a request");
        UsageBounds::of(&asked, body.len())
    }

    #[test]
    fn max_tokens_bounds_the_answer_for_each_choice_and_bytes_seen_extend_it() {
        let body = r#"{"model":"m","max_tokens":100,"n":2,"messages":[]}"#;
        let bounds = bounds(RouteKind::ChatCompletions, body);
        assert_eq!(bounds.completion, 2 * (100 + OVERSHOOT_TOKENS_MAX));
        let claim =
            |completion| Some(Usage { prompt: Some(1), completion: Some(completion), ..Usage::default() });
        assert!(bounds.check(claim(232), 233, 0).is_ok());
        let found = bounds.check(claim(233), 234, 0).expect_err("beyond");
        assert_eq!((found.direction, found.reported, found.possible), ("output", 233, 232));
        assert!(bounds.check(claim(1000), 1001, 1000).is_ok(), "a server that does not know max_tokens");
        assert!(bounds.check(claim(1001), 1002, 1000).is_err());
    }

    #[test]
    fn hidden_reasoning_is_possible_without_max_tokens_up_to_the_largest_context() {
        let bounds = bounds(RouteKind::ChatCompletions, r#"{"model":"m","messages":[]}"#);
        let claim = |completion| Some(Usage { completion: Some(completion), ..Usage::default() });
        assert!(bounds.check(claim(128_000), 128_000, 10).is_ok());
        assert!(bounds.check(claim(CONTEXT_TOKENS_MAX + 1), 0, 10).is_err());
        assert!(bounds.check(claim(9_223_372_036_854_775_807), 0, 10).is_err());
    }

    #[test]
    fn a_prompt_has_no_more_tokens_than_bytes_unless_the_model_reads_more() {
        let text = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;
        assert_eq!(bounds(RouteKind::ChatCompletions, text).prompt, text.len() as u64 + ADDED_TOKENS_MAX);
        let image = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"https://h/a.png"}}]}]}"#;
        assert_eq!(bounds(RouteKind::ChatCompletions, image).prompt, CONTEXT_TOKENS_MAX);
        let web = r#"{"model":"m","web_search_options":{},"messages":[]}"#;
        assert_eq!(bounds(RouteKind::ChatCompletions, web).prompt, CONTEXT_TOKENS_MAX);
        let earlier = r#"{"model":"m","previous_response_id":"r","input":"hi"}"#;
        assert_eq!(bounds(RouteKind::Responses, earlier).prompt, CONTEXT_TOKENS_MAX);
    }

    #[test]
    fn rejected_predictions_may_exceed_max_tokens() {
        let body = r#"{"model":"m","max_tokens":10,"prediction":{"type":"content","content":"ten words"},"messages":[]}"#;
        let most = bounds(RouteKind::ChatCompletions, body).completion;
        assert_eq!(most, 10 + OVERSHOOT_TOKENS_MAX + body.len() as u64);
    }

    fn counts(prompt: impl Into<Option<u64>>, completion: impl Into<Option<u64>>) -> Usage {
        Usage { prompt: prompt.into(), completion: completion.into(), ..Usage::default() }
    }

    #[test]
    fn later_reports_replace_counts_and_zeros_replace_none() {
        let first = Usage { cache_read: 40, ..counts(50, 1) };
        assert_eq!(first.then(counts(None, 7)), Usage { cache_read: 40, ..counts(50, 7) });
        assert_eq!(first.then(counts(0, 0)), first);
        assert_eq!(
            first.then(counts(50, 9)),
            Usage { cache_read: 40, ..counts(50, 9) },
            "its details are missing"
        );
        assert_eq!(first.then(counts(60, 9)), counts(60, 9), "another prompt has other parts");
        assert_eq!(counts(None, None).then(counts(0, 0)), counts(0, 0));
    }

    #[test]
    fn zeros_beside_text_are_no_counts() {
        assert_eq!(counts(5, 0).counted(true), Some(counts(5, None)));
        assert_eq!(counts(5, 0).counted(false), Some(counts(5, 0)));
        assert_eq!(counts(0, 0).counted(true), None);
        let tokens = |usage| Tokens::of(usage, 11, 22);
        assert_eq!(tokens(None), Tokens { source: Source::Counted, ..Tokens::reserved(11, 22) });
        assert_eq!(tokens(Some(counts(5, 6))), Tokens { source: Source::Provider, ..Tokens::reserved(5, 6) });
        assert_eq!(
            tokens(Some(counts(5, None))),
            Tokens { source: Source::Counted, ..Tokens::reserved(5, 22) }
        );
        assert_eq!(
            Tokens::of(Some(counts(5, None)), 1, 0).source,
            Source::Provider,
            "embeddings write nothing"
        );
    }

    #[test]
    fn embeddings_write_nothing_and_parts_cannot_be_more_than_the_whole() {
        let bounds = bounds(RouteKind::Embeddings, r#"{"model":"m","input":"hi"}"#);
        let usage = Some(Usage { prompt: Some(2), completion: Some(0), ..Usage::default() });
        assert!(bounds.check(usage, 2, 100_000).is_ok());
        let usage = Some(Usage { prompt: Some(2), completion: Some(1), ..Usage::default() });
        assert_eq!(bounds.check(usage, 2, 100_000).expect_err("beyond").direction, "output");
        let found = bounds.check(None, u64::MAX, 0).expect_err("a sum, or cached tokens, beyond everything");
        assert_eq!(found.direction, "other");
    }

    proptest! {
        #[test]
        fn whatever_is_reported_at_most_what_is_possible_is_believed(
            max_tokens in proptest::option::of(1u32..), n in 1u32..=128, prompt in any::<u64>(),
            completion in any::<u64>(), most in any::<u64>(), seen in 0u64..1 << 30,
        ) {
            let max = max_tokens.map(|most| format!(r#""max_tokens":{most},"#)).unwrap_or_default();
            let body = format!(r#"{{"model":"m",{max}"n":{n},"messages":[]}}"#);
            let bounds = bounds(RouteKind::ChatCompletions, &body);
            let usage = Usage { prompt: Some(prompt), completion: Some(completion), ..Usage::default() };
            let most_possible = (CONTEXT_TOKENS_MAX * u64::from(n)).max(seen);
            if bounds.check(Some(usage), most, seen).is_ok() {
                prop_assert!(prompt <= body.len() as u64 + ADDED_TOKENS_MAX && completion <= most_possible);
                prop_assert!(most <= bounds.prompt + most_possible);
            }
        }
    }
}
