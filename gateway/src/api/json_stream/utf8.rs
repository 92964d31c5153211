//! UTF-8 in pieces: a character may be cut anywhere.

/// Checks that pieces together are UTF-8.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Utf8 {
    /// The beginning of a character that a piece ended in.
    held: [u8; 4],
    len: usize,
}

impl Utf8 {
    /// False when the bytes so far are the beginning of no UTF-8 text.
    pub(super) fn take(&mut self, mut piece: &[u8]) -> bool {
        while self.len > 0 {
            let Some((&next, rest)) = piece.split_first() else { return true };
            self.held[self.len] = next;
            (self.len, piece) = (self.len + 1, rest);
            match std::str::from_utf8(&self.held[..self.len]) {
                Ok(_) => self.len = 0,
                Err(error) if error.error_len().is_some() || self.len == self.held.len() => return false,
                Err(_) => {}
            }
        }
        match std::str::from_utf8(piece) {
            Ok(_) => true,
            Err(error) if error.error_len().is_some() => false,
            Err(error) => {
                let tail = &piece[error.valid_up_to()..];
                self.held[..tail.len()].copy_from_slice(tail);
                self.len = tail.len();
                true
            }
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.len == 0
    }
}
