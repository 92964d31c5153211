//! A request that was read, and what it comes to for one model.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;
use weir_proto::resource::BalancingPolicy;
use weir_ratelimit::Cost;

use super::attempt::{Outgoing, Target};
use super::gateway::Gateway;
use crate::api::request::{Request, RouteKind};
use crate::api::usage::UsageBounds;
use crate::limits::estimates::Estimates;
use crate::limits::price;
use crate::limits::reservation::Subject;
use crate::routing::balance::{Candidate, Candidates, prefix_hash, stable_hash};
use crate::routing::entries::{KeyEntry, ModelEntry};
use crate::routing::model_use::ModelUse;
use crate::routing::probation::Probation;
use crate::routing::snapshot::Snapshot;

/// Tokens reserved for an image, a file or a sound, whose size in bytes says little: the upper end of what OpenAI
/// counts for one image of high detail with four tiles (85 + 4 x 170, rounded up).
const ATTACHMENT_TOKENS: u64 = 1000;

/// A request that was read, before a model has been settled on.
pub(super) struct Call<'a> {
    pub(super) gateway: &'a Gateway,
    /// The configuration of the whole request.
    pub(super) snapshot: &'a Snapshot,
    pub(super) key: &'a KeyEntry,
    pub(super) path: &'static str,
    pub(super) request: Request<'static>,
    pub(super) body: Bytes,
    pub(super) headers: Arc<HeaderMap>,
}

impl Call<'_> {
    /// The same for one model: the one that was asked for, or one of its fallbacks.
    pub(super) fn for_model<'b>(&'b self, model: &'b Arc<ModelEntry>, deadline: Instant) -> ModelCall<'b> {
        let (request, estimates) = (&self.request, &self.gateway.ledger.estimates);
        let text = estimates.prompt(&model.queue, request.prompt_bytes);
        let attached = u64::from(request.attachments) * ATTACHMENT_TOKENS;
        let prompt_tokens = text.saturating_add(attached);
        // A rate that other requests have driven up must not refuse this one for good.
        let least_prompt =
            text.min(Estimates::prior_prompt(request.prompt_bytes)).saturating_add(attached) / 2;
        let choices = u64::from(request.choices).max(1);
        let (expected, stated) = match (request.kind, request.max_output_tokens.map(u64::from)) {
            (RouteKind::Embeddings, _) => (0, 0),
            (_, most) => {
                let learned = estimates.output(&self.key.tenant.queue, &model.queue);
                (learned.min(most.unwrap_or(u64::MAX)), most.unwrap_or(0))
            }
        };
        ModelCall {
            call: self,
            model,
            prompt_tokens,
            reserved: price::cost(model, prompt_tokens, expected.saturating_mul(choices)),
            least: price::cost(model, least_prompt, stated.saturating_mul(choices)),
            deadline,
        }
    }

    /// The most tokens that an answer can have used.
    pub(super) fn usage_bounds(&self) -> UsageBounds {
        UsageBounds::of(&self.request, self.body.len())
    }
}

/// A request for one model.
pub(super) struct ModelCall<'a> {
    pub(super) call: &'a Call<'a>,
    pub(super) model: &'a Arc<ModelEntry>,
    /// Tokens of the prompt. Estimated once, since the estimates learn from other requests meanwhile.
    pub(super) prompt_tokens: u64,
    /// What to reserve: what answers of this model to this tenant usually have, up to what the request allows.
    pub(super) reserved: Cost,
    /// What it needs at the least: what it allows explicitly, and of the prompt the half of the estimate, or of four bytes to
    /// a token if that is less.
    pub(super) least: Cost,
    /// When the whole answer must be there.
    pub(super) deadline: Instant,
}

impl ModelCall<'_> {
    /// The first backends in the order in which to try them, and the probe of the first if that is on probation. All of
    /// them where accounts are limited, which groups of the whole order are asked for.
    pub(super) fn candidates(&self) -> (Candidates, Option<Probation>) {
        let (mut candidates, probation) =
            self.model.order(self.call.gateway.live.live_gateways(), self.prefix());
        if !self.model.accounts.is_empty() {
            let rest = self.rest(&candidates);
            if !rest.is_empty() {
                // All are asked for together: nobody is elsewhere.
                candidates.iter_mut().filter_map(|c| c.bound.as_mut()).for_each(|b| b.elsewhere = 0);
            }
            candidates.extend(rest);
        }
        (candidates, probation)
    }

    /// The backends after these first ones.
    pub(super) fn rest(&self, first: &[Candidate]) -> Candidates {
        self.model.rest(self.call.gateway.live.live_gateways(), self.prefix(), first)
    }

    /// What prefix affinity goes by: who asks and how the prompt begins.
    fn prefix(&self) -> Option<u64> {
        let (call, spec) = (self.call, &self.model.pool.spec);
        let wanted = spec.balancing_policy == BalancingPolicy::PrefixAffinity;
        let bytes = call.request.prompt_prefix(&call.body, spec.affinity.prefix_bytes as usize);
        let tenant = || stable_hash(call.key.tenant.name.as_str().as_bytes());
        (wanted && !bytes.is_empty()).then(|| prefix_hash(tenant(), bytes))
    }

    /// Whom and what its reservation is for.
    pub(super) fn subject(&self, model_use: &ModelUse) -> Subject {
        let request = &self.call.request;
        Subject {
            tenant: self.call.key.tenant.queue.clone(),
            model: self.model.queue.clone(),
            record: model_use.record.clone(),
            prompt_bytes: request.text_only.then_some(request.prompt_bytes),
            choices: request.choices,
        }
    }

    /// What to send to a backend.
    pub(super) fn outgoing(&self, target: &Target, request_id: HeaderValue) -> Outgoing {
        let call = self.call;
        let add_usage = !target.backend.state.refuses_addition(&target.model.name);
        Outgoing {
            kind: call.request.kind,
            dialect: target.backend.spec.dialect,
            path: call.path,
            client: call.headers.clone(),
            request_id,
            body: call.request.forward(&call.body, &target.upstream_model, add_usage),
            added_usage: add_usage && call.request.gains_usage(),
            memory: call.gateway.bodies.clone(),
            answer_max: call.gateway.answer_max,
            // No byte of an answer that is not streamed comes before all of it is there.
            first_byte_by: call.request.stream.then(|| Instant::now() + self.model.timeouts.first_byte),
            deadline: self.deadline,
        }
    }
}
