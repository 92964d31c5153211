//! The numbers of one `usage` object by their names, and what they mean in the dialect of the backend.
//!
//! Rules, in this order:
//! - The names of the endpoint count; other names only where those are absent or zero. Null, a missing name and what is no
//!   whole number say nothing, so they replace no count, and neither does zero.
//! - Tokens from the provider's cache are a part of the prompt, except under Anthropic's names
//!   (`cache_read_input_tokens` beside `input_tokens`), where they come on top. Relays of Anthropic put its cache counts
//!   beside OpenAI's names: there they come on top where they cannot be a part, being larger than the prompt.
//! - Reasoning is a part of the output, except where `total_tokens` shows that it comes on top: exactly in every dialect
//!   that names it, and in those that hide it (Gemini, Vertex AI, xAI) as what the total has beyond the two.
//! - A part is never more than its whole.

use weir_proto::resource::Dialect;

use super::Usage;
use crate::api::json_number::whole;
use crate::api::request::RouteKind;

/// A number of a `usage` object, by what it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) enum Field {
    /// `prompt_tokens`
    Prompt,
    /// `input_tokens`
    Input,
    /// `completion_tokens`
    Completion,
    /// `output_tokens`
    Output,
    /// `total_tokens`, `totalTokenCount`
    Total,
    /// `cached_tokens` of the details
    Cached,
    /// The names that some engines use in place of the details: `num_cached_tokens`, `prompt_cache_hit_tokens`
    CachedToo,
    /// `cache_read_input_tokens`
    CacheRead,
    /// `cache_write_tokens` of the details
    CacheWrite,
    /// `cache_creation_input_tokens`
    CacheCreation,
    /// The same, one number for each lifetime, which add up
    CacheCreationSplit,
    /// `reasoning_tokens` of the details
    Reasoning,
    /// `reasoning_tokens` beside the other counts
    ReasoningToo,
    /// `audio_tokens` of the prompt
    AudioIn,
    /// `audio_tokens` of the answer
    AudioOut,
    /// `image_tokens` of the prompt
    ImageIn,
    /// `image_tokens` of the answer
    ImageOut,
    /// `promptTokenCount`
    GeminiPrompt,
    /// `toolUsePromptTokenCount`, beside the prompt
    GeminiToolPrompt,
    /// `cachedContentTokenCount`
    GeminiCached,
    /// `candidatesTokenCount`
    GeminiCandidates,
    /// `thoughtsTokenCount`
    GeminiThoughts,
}

/// How many there are.
const FIELDS: usize = Field::GeminiThoughts as usize + 1;

/// Which part of a `usage` object a name stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) enum Part {
    /// The object itself.
    All,
    /// Details of the prompt.
    Prompt,
    /// Details of the answer.
    Answer,
    /// What was written to the cache, by lifetime.
    CacheCreation,
}

/// What a name of a `usage` object stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) enum Named {
    /// A number.
    Number(Field),
    /// An object of numbers.
    Details(Part),
}

impl Part {
    /// What a name in this part stands for, in all dialects; `None` for a name that counts no tokens which are charged.
    pub(in crate::api) fn named(self, name: &[u8]) -> Option<Named> {
        let field = match (self, name) {
            (Self::All, b"prompt_tokens_details" | b"input_tokens_details")
            | (Self::All, b"prompt_token_details" | b"input_token_details") => {
                return Some(Named::Details(Self::Prompt));
            }
            (
                Self::All,
                b"completion_tokens_details" | b"output_tokens_details" | b"output_token_details",
            ) => {
                return Some(Named::Details(Self::Answer));
            }
            (Self::All, b"cache_creation") => return Some(Named::Details(Self::CacheCreation)),
            (Self::All, b"prompt_tokens") => Field::Prompt,
            (Self::All, b"input_tokens") => Field::Input,
            (Self::All, b"completion_tokens") => Field::Completion,
            (Self::All, b"output_tokens") => Field::Output,
            (Self::All, b"total_tokens" | b"totalTokenCount") => Field::Total,
            (Self::All, b"num_cached_tokens" | b"prompt_cache_hit_tokens" | b"cached_tokens") => {
                Field::CachedToo
            }
            (Self::All, b"cache_read_input_tokens") => Field::CacheRead,
            (Self::All, b"cache_creation_input_tokens") => Field::CacheCreation,
            (Self::All, b"claude_cache_creation_5_m_tokens" | b"claude_cache_creation_1_h_tokens")
            | (Self::CacheCreation, b"ephemeral_5m_input_tokens" | b"ephemeral_1h_input_tokens") => {
                Field::CacheCreationSplit
            }
            (Self::All, b"reasoning_tokens" | b"thinking_tokens") => Field::ReasoningToo,
            (Self::All, b"promptTokenCount") => Field::GeminiPrompt,
            (Self::All, b"toolUsePromptTokenCount") => Field::GeminiToolPrompt,
            (Self::All, b"cachedContentTokenCount") => Field::GeminiCached,
            (Self::All, b"candidatesTokenCount" | b"responseTokenCount") => Field::GeminiCandidates,
            (Self::All, b"thoughtsTokenCount") => Field::GeminiThoughts,
            (Self::Prompt, b"cached_tokens") => Field::Cached,
            (Self::Prompt, b"cache_write_tokens" | b"cache_creation_tokens" | b"cached_creation_tokens") => {
                Field::CacheWrite
            }
            (Self::Prompt, b"audio_tokens") => Field::AudioIn,
            (Self::Prompt, b"image_tokens") => Field::ImageIn,
            (Self::Answer, b"reasoning_tokens" | b"thinking_tokens") => Field::Reasoning,
            (Self::Answer, b"audio_tokens") => Field::AudioOut,
            (Self::Answer, b"image_tokens") => Field::ImageOut,
            _ => return None,
        };
        Some(Named::Number(field))
    }
}

/// The numbers of one `usage` object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::api) struct Counts {
    numbers: [u64; FIELDS],
    /// Bit n is set where number n is there.
    there: u32,
    /// The largest of them.
    pub(in crate::api) most: u64,
}

impl Counts {
    /// Takes a number as it is written; what is no whole number of tokens says nothing.
    pub(in crate::api) fn take(&mut self, field: Field, written: Option<&[u8]>) {
        let Some(count) = written.and_then(whole) else { return };
        let number = &mut self.numbers[field as usize];
        *number = match field {
            Field::CacheCreationSplit => number.saturating_add(count),
            // Of a repeated name the last number counts, but zero replaces none.
            _ if count == 0 => *number,
            _ => count,
        };
        self.there |= 1 << field as u32;
        self.most = self.most.max(count);
    }

    fn get(&self, field: Field) -> Option<u64> {
        (self.there & 1 << field as u32 != 0).then(|| self.numbers[field as usize])
    }

    /// The first of these numbers that is not zero, and which it is; zero where they are all zero, `None` where none is
    /// there.
    fn first<const N: usize>(&self, fields: [Field; N]) -> Option<(u64, Field)> {
        let there = || fields.into_iter().filter_map(|field| Some((self.get(field)?, field)));
        there().find(|(count, _)| *count > 0).or_else(|| there().next())
    }

    fn count<const N: usize>(&self, fields: [Field; N]) -> u64 {
        self.first(fields).map_or(0, |(count, _)| count)
    }

    /// Tokens of the answer under the names that clients of OpenAI's API read; `None` where those are not there.
    pub(in crate::api) fn shown_completion(&self) -> Option<u64> {
        self.get(Field::Prompt).and(self.get(Field::Completion))
    }

    /// What the numbers mean. `None` when they count neither the prompt nor the answer.
    pub(in crate::api) fn read(&self, kind: RouteKind, dialect: Dialect) -> Option<Usage> {
        let (prompt, answer) = match kind {
            RouteKind::Responses => {
                (self.first([Field::Input, Field::Prompt]), self.first([Field::Output, Field::Completion]))
            }
            RouteKind::ChatCompletions | RouteKind::Completions | RouteKind::Embeddings => {
                (self.first([Field::Prompt, Field::Input]), self.first([Field::Completion, Field::Output]))
            }
        };
        if prompt.is_none() && answer.is_none() {
            return self.gemini();
        }
        let stated = prompt.map(|(count, _)| count);
        let mut usage = Usage { prompt: stated, ..Usage::default() };
        if let Some((prompt, named)) = prompt {
            self.cache(&mut usage, prompt, named, dialect);
        }
        let reasoning = self.count([Field::Reasoning, Field::ReasoningToo]);
        let answer = answer.map(|(count, _)| count);
        let beside = self.reasoning_beside(stated, answer.unwrap_or(0), reasoning, dialect);
        usage.completion = match (answer, beside) {
            (None, 0) => None,
            (answer, beside) => Some(answer.unwrap_or(0).saturating_add(beside)),
        };
        usage.reasoning = reasoning.max(beside);
        usage.audio_in = self.count([Field::AudioIn]);
        usage.image_in = self.count([Field::ImageIn]);
        usage.audio_out = self.count([Field::AudioOut]);
        usage.image_out = self.count([Field::ImageOut]);
        Some(usage.within_wholes())
    }

    /// Sets the tokens of the prompt that came from the cache or went there.
    fn cache(&self, usage: &mut Usage, prompt: u64, named: Field, dialect: Dialect) {
        let read = self.first([Field::Cached, Field::CachedToo, Field::CacheRead]);
        let write = self.first([Field::CacheWrite, Field::CacheCreation, Field::CacheCreationSplit]);
        let anthropic = |found: Option<(u64, Field)>| {
            let ours = [Field::CacheRead, Field::CacheCreation, Field::CacheCreationSplit];
            found.is_none_or(|(count, field)| count == 0 || ours.contains(&field))
        };
        let (cached, written) = (read.map_or(0, |(count, _)| count), write.map_or(0, |(count, _)| count));
        let together = cached.saturating_add(written);
        let on_top = match named {
            Field::Input => anthropic(read) && anthropic(write),
            _ => dialect.relays_anthropic() && together > prompt,
        };
        if on_top {
            usage.prompt = Some(prompt.saturating_add(together));
        }
        (usage.cache_read, usage.cache_write) = (cached, written);
    }

    /// The tokens of reasoning that are not in the count of the answer.
    fn reasoning_beside(&self, prompt: Option<u64>, answer: u64, reasoning: u64, dialect: Dialect) -> u64 {
        let total = self.get(Field::Total).unwrap_or(0);
        let (Some(prompt), true) = (prompt, total > 0) else { return 0 };
        let beyond = total.saturating_sub(prompt.saturating_add(answer));
        match (dialect.hides_reasoning(), reasoning) {
            (true, 0) => beyond,
            (true, reasoning) => beyond.min(reasoning),
            (false, reasoning) if reasoning == beyond => beyond,
            (false, _) => 0,
        }
    }

    /// Gemini's own names, as relays pass them on.
    fn gemini(&self) -> Option<Usage> {
        let prompt = self.get(Field::GeminiPrompt);
        let (candidates, thoughts) = (self.get(Field::GeminiCandidates), self.get(Field::GeminiThoughts));
        if prompt.is_none() && candidates.is_none() && thoughts.is_none() {
            return None;
        }
        let read = prompt.map(|prompt| prompt.saturating_add(self.count([Field::GeminiToolPrompt])));
        let (written, thought) = (candidates.unwrap_or(0), thoughts.unwrap_or(0));
        // Some versions count the thoughts among the candidates; their total shows it.
        let inside = self.get(Field::Total) == Some(read.unwrap_or(0).saturating_add(written));
        let all = if inside { written.max(thought) } else { written.saturating_add(thought) };
        let usage = Usage {
            prompt: read,
            completion: candidates.or(thoughts).map(|_| all),
            cache_read: self.count([Field::GeminiCached]),
            reasoning: thought,
            ..Usage::default()
        };
        Some(usage.within_wholes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_counts_are_read_without_a_panic_and_parts_stay_within_their_wholes(
            numbers in proptest::collection::vec((0usize..FIELDS, any::<u64>()), 0..12), dialect in 0usize..Dialect::ALL.len(),
        ) {
            let mut counts = Counts::default();
            for (field, number) in numbers {
                counts.numbers[field] = number;
                counts.there |= 1 << field;
            }
            for kind in [RouteKind::ChatCompletions, RouteKind::Responses] {
                let Some(usage) = counts.read(kind, Dialect::ALL[dialect]) else { continue };
                prop_assert_eq!(usage, usage.within_wholes());
                prop_assert!(usage.input_uncached() <= usage.prompt.unwrap_or(0));
            }
        }
    }
}
