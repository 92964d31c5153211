//! The parts of a body, put together.

use bytes::Bytes;

/// A body of which parts arrive. Most bodies come in one part, which is not copied.
#[derive(Debug)]
pub(super) struct Joined {
    first: Bytes,
    /// All of it, when there is more than one part.
    all: Vec<u8>,
    announced: Option<usize>,
}

impl Joined {
    /// Of a body that is said to have so many bytes. That is not believed: memory grows with what has arrived, and what is
    /// announced only keeps it from growing further.
    pub(super) fn of(announced: Option<usize>) -> Self {
        Self { first: Bytes::new(), all: Vec::new(), announced }
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> usize {
        self.first.len().max(self.all.len())
    }

    /// Adds a part.
    pub(super) fn push(&mut self, part: Bytes) {
        if self.len() == 0 {
            self.first = part;
            return;
        }
        if self.all.is_empty() {
            let first = std::mem::take(&mut self.first);
            self.make_room(first.len() + part.len());
            self.all.extend_from_slice(&first);
        }
        self.make_room(part.len());
        self.all.extend_from_slice(&part);
    }

    /// All of it.
    pub(super) fn finish(self) -> Bytes {
        if self.all.is_empty() { self.first } else { self.all.into() }
    }

    /// Room for so many bytes more: as `Vec` does it, but not beyond what is announced.
    fn make_room(&mut self, more: usize) {
        if self.all.capacity() - self.all.len() < more {
            let length = self.all.len() + more;
            let room = self.announced.unwrap_or(usize::MAX).clamp(length, length * 2);
            self.all.reserve_exact(room - self.all.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_are_put_together_in_room_for_twice_as_much_at_most(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..50),
            announced in proptest::option::of(0usize..20_000),
        ) {
            let mut joined = Joined::of(announced);
            for (i, part) in parts.iter().enumerate() {
                joined.push(Bytes::from(part.clone()));
                prop_assert_eq!(joined.len(), parts[..=i].concat().len());
                prop_assert!(joined.all.capacity() <= joined.len() * 2);
                if announced.is_some_and(|announced| announced >= joined.len()) {
                    prop_assert!(joined.all.capacity() <= announced.unwrap_or_default());
                }
            }
            prop_assert_eq!(joined.finish(), parts.concat());
        }
    }

    #[test]
    fn one_part_is_not_copied() {
        let part = Bytes::from_static(b"whole");
        let mut joined = Joined::of(None);
        joined.push(Bytes::new());
        joined.push(part.clone());
        assert_eq!(joined.finish().as_ptr(), part.as_ptr());
    }
}
