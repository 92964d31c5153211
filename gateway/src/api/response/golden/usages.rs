//! Usage objects of many providers and the one form that they are read to.

use weir_proto::resource::Dialect::{self, *};

use crate::api::request::RouteKind::{self, *};
use crate::api::response::ReadAnswer;
use crate::api::usage::{Usage, UsageBounds};

/// Prompt, of it from the cache and to it; answer, of it reasoning.
const fn counts(prompt: u64, cache_read: u64, cache_write: u64, completion: u64, reasoning: u64) -> Usage {
    Usage {
        prompt: Some(prompt),
        completion: Some(completion),
        cache_read,
        cache_write,
        reasoning,
        audio_in: 0,
        image_in: 0,
        audio_out: 0,
        image_out: 0,
    }
}

/// The same without an answer.
const fn read(prompt: u64) -> Usage {
    Usage { completion: None, ..counts(prompt, 0, 0, 0, 0) }
}

/// The answer alone.
const fn wrote(completion: u64) -> Usage {
    Usage { prompt: None, ..counts(0, 0, 0, completion, 0) }
}

type Row = (&'static str, RouteKind, Dialect, &'static str, Option<Usage>);

/// What it shows, endpoint, dialect, the members of an answer, what is read.
#[rustfmt::skip]
const TABLE: &[Row] = &[
    ("cached and audio of zero", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":2006,"completion_tokens":300,"total_tokens":2306,"prompt_tokens_details":{"cached_tokens":1920,"audio_tokens":0}}"#, Some(counts(2006, 1920, 0, 300, 0))),
    ("reasoning inside", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":1000,"completion_tokens":900,"total_tokens":1900,"completion_tokens_details":{"reasoning_tokens":640,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}"#, Some(counts(1000, 0, 0, 900, 640))),
    ("written to the cache, inside", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":10000,"completion_tokens":500,"total_tokens":10500,"prompt_tokens_details":{"cached_tokens":6000,"cache_write_tokens":3000}}"#, Some(counts(10000, 6000, 3000, 500, 0))),
    ("a total beyond the sum without a reason", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":1469,"completion_tokens":744,"total_tokens":2496,"completion_tokens_details":null}"#, Some(counts(1469, 0, 0, 744, 0))),
    ("reasoning beside, shown by the total", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":2341,"completion_tokens":31,"total_tokens":3108,"completion_tokens_details":{"reasoning_tokens":736}}"#, Some(counts(2341, 0, 0, 767, 736))),
    ("audio in and out", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":120,"completion_tokens":260,"total_tokens":380,"prompt_tokens_details":{"text_tokens":20,"audio_tokens":100},"completion_tokens_details":{"text_tokens":60,"audio_tokens":200}}"#, Some(Usage { audio_in: 100, audio_out: 200, ..counts(120, 0, 0, 260, 0) })),
    ("images in and out", Responses, OpenAi, r#""usage":{"input_tokens":50,"input_tokens_details":{"text_tokens":10,"image_tokens":40},"output_tokens":50,"output_tokens_details":{"image_tokens":48},"total_tokens":100}"#, Some(Usage { image_in: 40, image_out: 48, ..counts(50, 0, 0, 50, 0) })),
    ("lifetimes of the cache", Responses, OpenAi, r#""usage":{"input_tokens":300000,"input_tokens_details":{"cached_tokens":200000,"cache_write_tokens":60000,"cache_write_tokens_details":{"ttl_30m_tokens":20000,"ttl_12h_tokens":40000}},"output_tokens":2000,"output_tokens_details":{"reasoning_tokens":1500},"total_tokens":302000}"#, Some(counts(300000, 200000, 60000, 2000, 1500))),
    ("chat's names on responses", Responses, OpenAi, r#""usage":{"prompt_tokens":5,"completion_tokens":2,"input_tokens":0,"output_tokens":0}"#, Some(counts(5, 0, 0, 2, 0))),
    ("both names, of which the endpoint's count", Responses, OpenAi, r#""usage":{"prompt_tokens":1,"completion_tokens":1,"input_tokens":5,"output_tokens":2}"#, Some(counts(5, 0, 0, 2, 0))),
    ("both names, of which the endpoint's count", ChatCompletions, OpenAi, r#""usage":{"input_tokens":5,"output_tokens":2,"prompt_tokens":3,"completion_tokens":1}"#, Some(counts(3, 0, 0, 1, 0))),
    ("no completion for embeddings", Embeddings, OpenAi, r#""usage":{"prompt_tokens":8,"total_tokens":8}"#, Some(read(8))),
    ("zero completion for embeddings", Embeddings, Vllm, r#""usage":{"prompt_tokens":8,"total_tokens":8,"completion_tokens":0,"prompt_tokens_details":null}"#, Some(counts(8, 0, 0, 0, 0))),
    ("details that are null", Completions, Azure, r#""usage":{"prompt_tokens":19,"completion_tokens":7,"total_tokens":26,"prompt_tokens_details":null,"completion_tokens_details":null}"#, Some(counts(19, 0, 0, 7, 0))),
    ("details of null", ChatCompletions, Azure, r#""usage":{"prompt_tokens":19,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":null},"completion_tokens_details":{"reasoning_tokens":null}}"#, Some(counts(19, 0, 0, 7, 0))),
    ("beside, with lifetimes", ChatCompletions, Anthropic, r#""usage":{"input_tokens":12,"cache_creation_input_tokens":5000,"cache_creation":{"ephemeral_5m_input_tokens":2000,"ephemeral_1h_input_tokens":3000},"cache_read_input_tokens":20000,"output_tokens":503}"#, Some(counts(25012, 20000, 5000, 503, 0))),
    ("beside, lifetimes alone", ChatCompletions, Anthropic, r#""usage":{"input_tokens":12,"cache_creation":{"ephemeral_5m_input_tokens":2000,"ephemeral_1h_input_tokens":3000},"output_tokens":503}"#, Some(counts(5012, 0, 5000, 503, 0))),
    ("thinking inside", ChatCompletions, Anthropic, r#""usage":{"input_tokens":9,"output_tokens":300,"output_tokens_details":{"thinking_tokens":250},"service_tier":"standard"}"#, Some(counts(9, 0, 0, 300, 250))),
    ("its endpoint for OpenAI's clients", ChatCompletions, Anthropic, r#""usage":{"prompt_tokens":40,"completion_tokens":12,"total_tokens":52,"prompt_tokens_details":null}"#, Some(counts(40, 0, 0, 12, 0))),
    ("a relay with cache counts beside OpenAI's names", ChatCompletions, Anthropic, r#""usage":{"prompt_tokens":25,"completion_tokens":240,"total_tokens":265,"cache_read_input_tokens":18000,"cache_creation_input_tokens":0}"#, Some(counts(18025, 18000, 0, 240, 0))),
    ("a relay with cache counts inside", ChatCompletions, Anthropic, r#""usage":{"prompt_tokens":18025,"completion_tokens":240,"total_tokens":18265,"cache_read_input_tokens":18000,"prompt_tokens_details":{"cached_tokens":18000}}"#, Some(counts(18025, 18000, 0, 240, 0))),
    ("more cached than read is clamped", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":25,"completion_tokens":240,"prompt_tokens_details":{"cached_tokens":18000}}"#, Some(counts(25, 25, 0, 240, 0))),
    ("thoughts in the total only", ChatCompletions, Gemini, r#""usage":{"prompt_tokens":1469,"completion_tokens":744,"total_tokens":2496,"completion_tokens_details":null}"#, Some(counts(1469, 0, 0, 1027, 283))),
    ("nothing but thoughts", ChatCompletions, Gemini, r#""usage":{"prompt_tokens":21,"completion_tokens":0,"total_tokens":81,"completion_tokens_details":{"reasoning_tokens":60}}"#, Some(counts(21, 0, 0, 60, 60))),
    ("nothing but thoughts, without a name for the rest", ChatCompletions, Gemini, r#""usage":{"prompt_tokens":21,"total_tokens":81}"#, Some(counts(21, 0, 0, 60, 60))),
    ("an implicit cache hit", ChatCompletions, Gemini, r#""usage":{"prompt_tokens":5000,"completion_tokens":10,"total_tokens":5010,"prompt_tokens_details":{"cached_tokens":4096}}"#, Some(counts(5000, 4096, 0, 10, 0))),
    ("its own names, thoughts beside", ChatCompletions, Gemini, r#""usageMetadata":{"promptTokenCount":1500,"cachedContentTokenCount":1000,"candidatesTokenCount":200,"thoughtsTokenCount":700,"totalTokenCount":2400}"#, Some(counts(1500, 1000, 0, 900, 700))),
    ("its own names, thoughts inside", ChatCompletions, Gemini, r#""usageMetadata":{"promptTokenCount":100,"candidatesTokenCount":300,"thoughtsTokenCount":120,"totalTokenCount":400}"#, Some(counts(100, 0, 0, 300, 120))),
    ("its own names, prompt of tools", ChatCompletions, Gemini, r#""usageMetadata":{"promptTokenCount":1000,"toolUsePromptTokenCount":400,"candidatesTokenCount":50,"totalTokenCount":1450}"#, Some(counts(1400, 0, 0, 50, 0))),
    ("its own names, thoughts only", ChatCompletions, Gemini, r#""usageMetadata":{"promptTokenCount":10,"thoughtsTokenCount":50,"totalTokenCount":60}"#, Some(counts(10, 0, 0, 50, 50))),
    ("reasoning beside", ChatCompletions, Vertex, r#""usage":{"completion_tokens":45,"completion_tokens_details":{"reasoning_tokens":504},"extra_properties":{"google":{"traffic_type":"ON_DEMAND"}},"prompt_tokens":27,"total_tokens":576}"#, Some(counts(27, 0, 0, 549, 504))),
    ("reasoning beside", ChatCompletions, Xai, r#""usage":{"prompt_tokens":2341,"completion_tokens":31,"total_tokens":3108,"prompt_tokens_details":{"cached_tokens":2000},"completion_tokens_details":{"reasoning_tokens":736}}"#, Some(counts(2341, 2000, 0, 767, 736))),
    ("reasoning inside", ChatCompletions, Xai, r#""usage":{"prompt_tokens":100,"completion_tokens":50,"total_tokens":150,"completion_tokens_details":{"reasoning_tokens":20}}"#, Some(counts(100, 0, 0, 50, 20))),
    ("a total beyond all reasoning", ChatCompletions, Xai, r#""usage":{"prompt_tokens":100,"completion_tokens":50,"total_tokens":900,"completion_tokens_details":{"reasoning_tokens":20}}"#, Some(counts(100, 0, 0, 70, 20))),
    ("a total below the sum", ChatCompletions, Xai, r#""usage":{"prompt_tokens":100,"completion_tokens":50,"total_tokens":120}"#, Some(counts(100, 0, 0, 50, 0))),
    ("hits and misses", ChatCompletions, DeepSeek, r#""usage":{"prompt_tokens":3000,"completion_tokens":400,"total_tokens":3400,"prompt_cache_hit_tokens":2560,"prompt_cache_miss_tokens":440,"completion_tokens_details":{"reasoning_tokens":250}}"#, Some(counts(3000, 2560, 0, 400, 250))),
    ("cached under three names", ChatCompletions, Mistral, r#""usage":{"prompt_tokens":11,"completion_tokens":8,"total_tokens":19,"num_cached_tokens":4,"prompt_token_details":{"cached_tokens":4},"prompt_tokens_details":{"cached_tokens":4},"request_count":1}"#, Some(counts(11, 4, 0, 8, 0))),
    ("cached under the old name alone", ChatCompletions, Mistral, r#""usage":{"prompt_tokens":11,"completion_tokens":8,"total_tokens":19,"num_cached_tokens":4}"#, Some(counts(11, 4, 0, 8, 0))),
    ("in x_groq", ChatCompletions, Groq, r#""x_groq":{"id":"req_1","usage":{"prompt_tokens":30,"completion_tokens":70,"total_tokens":100,"queue_time":0.01}}"#, Some(counts(30, 0, 0, 70, 0))),
    ("in x_groq beside zeros", ChatCompletions, Groq, r#""usage":{"prompt_tokens":0,"completion_tokens":0},"x_groq":{"usage":{"prompt_tokens":30,"completion_tokens":70}}"#, Some(counts(30, 0, 0, 70, 0))),
    ("usage before x_groq", ChatCompletions, Groq, r#""x_groq":{"usage":{"prompt_tokens":30,"completion_tokens":70}},"usage":{"prompt_tokens":31,"completion_tokens":71}"#, Some(counts(31, 0, 0, 71, 0))),
    ("a cost beside the counts", ChatCompletions, OpenRouter, r#""usage":{"prompt_tokens":194,"completion_tokens":2,"total_tokens":196,"cost":0.00095,"cost_details":{"upstream_inference_cost":null},"is_byok":false}"#, Some(counts(194, 0, 0, 2, 0))),
    ("Anthropic inside OpenAI's names", ChatCompletions, OpenRouter, r#""usage":{"prompt_tokens":18014,"completion_tokens":9,"total_tokens":18023,"prompt_tokens_details":{"cached_tokens":0,"cache_write_tokens":18011}}"#, Some(counts(18014, 0, 18011, 9, 0))),
    ("zeros under other names", ChatCompletions, NewApi, r#""usage":{"prompt_tokens":686,"completion_tokens":123,"total_tokens":809,"input_tokens":0,"output_tokens":0,"input_tokens_details":null,"claude_cache_creation_5_m_tokens":0}"#, Some(counts(686, 0, 0, 123, 0))),
    ("zeros under the endpoint's names", ChatCompletions, NewApi, r#""usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0,"input_tokens":686,"output_tokens":123}"#, Some(counts(686, 0, 0, 123, 0))),
    ("lifetimes under names of its own", ChatCompletions, NewApi, r#""usage":{"prompt_tokens":100,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":10},"claude_cache_creation_5_m_tokens":20,"claude_cache_creation_1_h_tokens":30}"#, Some(counts(100, 10, 50, 9, 0))),
    ("the last of continuous usage", ChatCompletions, Vllm, r#""usage":{"prompt_tokens":57,"completion_tokens":18,"total_tokens":75,"prompt_tokens_details":{"cached_tokens":48}}"#, Some(counts(57, 48, 0, 18, 0))),
    ("reasoning beside the details", ChatCompletions, Sglang, r#""usage":{"prompt_tokens":64,"completion_tokens":40,"total_tokens":104,"prompt_tokens_details":null,"reasoning_tokens":25}"#, Some(counts(64, 0, 0, 40, 25))),
    ("timings are no usage", ChatCompletions, LlamaCpp, r#""usage":{"completion_tokens":18,"prompt_tokens":57,"total_tokens":75},"timings":{"prompt_n":9,"predicted_n":19,"cache_n":48}"#, Some(counts(57, 0, 0, 18, 0))),
    ("timings alone", ChatCompletions, LlamaCpp, r#""timings":{"prompt_n":9,"predicted_n":19,"cache_n":48}"#, None),
    ("three numbers", Completions, Tgi, r#""usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}"#, Some(counts(5, 0, 0, 2, 0))),
    ("a prompt that was cached", ChatCompletions, Ollama, r#""usage":{"prompt_tokens":0,"completion_tokens":259,"total_tokens":259}"#, Some(wrote(259))),
    ("zeros beside nothing", ChatCompletions, Ollama, r#""usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}"#, Some(wrote(0))),
    ("zeros beside text", ChatCompletions, OpenAi, r#""choices":[{"message":{"content":"text"}}],"usage":{"prompt_tokens":7,"completion_tokens":0,"total_tokens":7}"#, Some(read(7))),
    ("all zeros beside text", ChatCompletions, OpenAi, r#""choices":[{"message":{"content":"text"}}],"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}"#, None),
    ("in the choice", ChatCompletions, OpenAi, r#""choices":[{"message":{"content":"text"},"usage":{"prompt_tokens":1900,"completion_tokens":1300,"total_tokens":3200}}]"#, Some(counts(1900, 0, 0, 1300, 0))),
    ("whole floats", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":1900.0,"completion_tokens":1.3e3,"total_tokens":3.2E+3,"prompt_tokens_details":{"cached_tokens":1024.00}}"#, Some(counts(1900, 1024, 0, 1300, 0))),
    ("what is no count", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":-1,"completion_tokens":1.5,"total_tokens":"9"}"#, None),
    ("cached beside, without details", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":1900,"completion_tokens":13,"total_tokens":1913,"cached_tokens":1024}"#, Some(counts(1900, 1024, 0, 13, 0))),
    ("tokens of citations are none of the prompt", ChatCompletions, OpenAi, r#""usage":{"prompt_tokens":26,"completion_tokens":832,"total_tokens":858,"citation_tokens":99999999,"num_search_queries":28,"search_context_size":"low"}"#, Some(counts(26, 0, 0, 832, 0))),
    ("usage in a place of no meaning", ChatCompletions, OpenAi, r#""meta":{"usage":{"prompt_tokens":1,"completion_tokens":1}},"choices":[{"message":{"usage":{"prompt_tokens":1}}}]"#, None),
    ("the usage of a response that an event carries", Responses, OpenAi, r#""type":"response.completed","response":{"usage":{"input_tokens":4,"output_tokens":2}}"#, Some(counts(4, 0, 0, 2, 0))),
    ("a response on another endpoint", ChatCompletions, OpenAi, r#""response":{"usage":{"input_tokens":4,"output_tokens":2}}"#, None),
];

#[test]
fn every_usage_is_read_to_the_one_form() {
    for (what, kind, dialect, members, expected) in TABLE {
        let body = format!(r#"{{"id":"1",{members},"model":"up"}}"#);
        let bounds =
            UsageBounds { prompt: 2_000_000, completion: if *kind == Embeddings { 0 } else { 2_000_000 } };
        let read = ReadAnswer::of(body.as_bytes(), *kind, *dialect).expect("JSON");
        let read = read.usage(body.len(), &bounds);
        assert_eq!(read.as_ref().ok(), Some(expected), "{dialect:?}, {what}: {members}");
        if let Some(usage) = expected {
            let parts = usage.input_uncached() + usage.cache_read + usage.cache_write;
            assert_eq!(parts, usage.prompt.unwrap_or(0), "{what}");
        }
    }
}

#[test]
fn the_table_is_of_many_providers() {
    let dialects: std::collections::HashSet<Dialect> = TABLE.iter().map(|row| row.2).collect();
    assert!(TABLE.len() >= 40 && dialects.len() == Dialect::ALL.len(), "{} of {dialects:?}", TABLE.len());
}
