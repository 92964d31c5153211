use weir_discovery::ConfigState;

use crate::input::{Input, sealed};

/// A file is refused or is a copy, which is the same when written and read again; every resource of it is used or refused.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let right = input.byte() & 1 == 0;
    let Ok(held) = ConfigState::decode(&sealed(b"WEIRCFG1", right, input.rest())) else { return };
    let again = ConfigState::decode(&held.encode()).expect("what was written is read");
    assert_eq!((&again.epoch, again.revision), (&held.epoch, held.revision));
    assert_eq!(again.bodies(), held.bodies());
    let (good, refused) = held.checked();
    assert_eq!(good.len() + refused.len(), held.len());
    assert_eq!(held.versions().len(), held.len());
}
