//! Names that many objects share: one allocation for each text that is in use.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// A name. Copies share it.
pub type Text = Arc<str>;

/// Texts that were asked for, and how many there were after the last sweep.
#[derive(Default)]
struct Known {
    texts: HashSet<Text>,
    swept: usize,
}

/// Texts below this number are never swept.
const FEW: usize = 1_024;

static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);

/// The one copy of a text. Texts that nobody has any more are forgotten when their number may have doubled.
#[must_use]
pub fn intern(text: &str) -> Text {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(text) = known.texts.get(text) {
        return Arc::clone(text);
    }
    if known.texts.len() >= FEW.max(known.swept * 2) {
        known.texts.retain(|text| Arc::strong_count(text) > 1);
        known.swept = known.texts.len();
    }
    let text = Text::from(text);
    known.texts.insert(Arc::clone(&text));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one_and_texts_that_are_gone_are_forgotten() {
        let kept = intern("kept");
        for number in 0..10 * FEW {
            drop(intern(&format!("text {number}")));
        }
        assert!(Arc::ptr_eq(&kept, &intern("kept")));
        let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner).texts.len();
        assert!(known < 5 * FEW, "{known} texts of which nobody has any more than one");
    }
}
