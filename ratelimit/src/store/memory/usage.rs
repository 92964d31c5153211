//! Usage records, as `scripts/settle.lua` keeps them.

use std::cmp::Reverse;

use super::store::{Day, Due, State, later};
use crate::model::key::Key;
use crate::model::usage::{OTHER_MODELS, USAGE_LIFE, USAGE_MODELS_MAX, Usage, UsageLines};

impl State {
    pub(super) fn note_usage(&mut self, usage: &Usage, now: u64) {
        if self.usage.get(&usage.record).is_none_or(|day| day.expires <= now) {
            let expires = later(now, USAGE_LIFE);
            self.usage.insert(usage.record.clone(), Day { expires, ..Day::default() });
            self.due.push(Reverse((expires, Due::Usage(usage.record.clone()))));
        }
        let Some(Day { lines, .. }) = self.usage.get_mut(&usage.record) else { return };
        let mut model = usage.model.clone();
        if lines.len() >= USAGE_MODELS_MAX && !lines.contains_key(&model) {
            model = OTHER_MODELS.into();
        }
        let line = lines.entry(model).or_default();
        *line = line.plus(usage.tally);
    }

    pub(super) fn usage_lines(&self, record: &Key, now: u64) -> UsageLines {
        let day = self.usage.get(record).filter(|day| day.expires > now);
        day.into_iter().flat_map(|day| &day.lines).map(|(model, tally)| (model.to_string(), *tally)).collect()
    }
}
