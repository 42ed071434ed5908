//! Which keys a run certainly does not have.
//!
//! A Bloom filter: 10 bits a key and 6 probes, so one key in a hundred that is not there is looked for in vain. Pure.

use super::key::Key;

const BITS_PER_KEY: u64 = 10;
const PROBES: u64 = 6;

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    words: Vec<u64>,
}

impl Filter {
    /// For so many keys at most; with more it errs more often.
    pub(super) fn with_room_for(keys: u64) -> Self {
        let words = usize::try_from((keys * BITS_PER_KEY).div_ceil(64).max(1)).expect("keys of a run fit into memory");
        Self { words: vec![0; words] }
    }

    pub(super) fn add(&mut self, key: Key) {
        for (word, bit) in self.probes(key) {
            self.words[word] |= bit;
        }
    }

    /// `false` only if the key was not added.
    pub(super) fn may_have(&self, key: Key) -> bool {
        self.words.is_empty() || self.probes(key).all(|(word, bit)| self.words[word] & bit != 0)
    }

    fn probes(&self, key: Key) -> impl Iterator<Item = (usize, u64)> + use<> {
        let (first, step) = key.random_bits();
        let bits = self.words.len() as u64 * 64;
        (0..PROBES).map(move |probe| {
            let bit = first.wrapping_add(probe.wrapping_mul(step | 1)) % bits;
            (usize::try_from(bit / 64).expect("below the number of words"), 1 << (bit % 64))
        })
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// A filter that errs on every key, if there are no bytes.
    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self { words: words.iter().map(|word| u64::from_le_bytes(*word)).collect() }
    }
}

#[cfg(test)]
mod tests {
    use chat_protocol::UserId;

    use super::super::key::Keys;
    use super::*;

    fn key(number: u32) -> Key {
        Keys::new((1, 2)).inbox(&UserId::parse(&format!("user-{number}")).unwrap())
    }

    #[test]
    fn what_was_added_may_be_there_and_most_else_is_not() {
        let mut filter = Filter::with_room_for(10_000);
        (0..10_000).for_each(|number| filter.add(key(number)));
        let filter = Filter::from_bytes(&filter.to_bytes());
        assert!((0..10_000).all(|number| filter.may_have(key(number))));
        let wrong = (10_000..20_000).filter(|number| filter.may_have(key(*number))).count();
        assert!(wrong < 200, "{wrong} of 10,000");
        assert!(Filter::default().may_have(key(1)));
    }
}
