//! Whose certificates are taken: what TLS was told last.
//!
//! A certificate is good for as long as nobody who was trusted when it was shown has been taken from the list. Whoever is added to it ends
//! nothing.

use std::collections::BTreeSet;

use broker::service::Credential;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use super::fingerprint;

/// Those whose certificates are taken. What was taken by others is not good any more.
#[derive(Debug, Default)]
pub struct Authorities(Mutex<FxHashMap<Credential, BTreeSet<Vec<u8>>>>);

impl Authorities {
    /// From now on it is these, each in DER. What is taken by them has this credential.
    pub fn set<'a>(&self, authorities: impl IntoIterator<Item = &'a [u8]>) -> Credential {
        let trusted: BTreeSet<Vec<u8>> = authorities.into_iter().map(<[u8]>::to_vec).collect();
        let parts: Vec<&[u8]> = trusted.iter().map(Vec::as_slice).collect();
        let credential = fingerprint(&parts);
        let mut sets = self.0.lock();
        // Each that is left has fewer than the next: there are no more of them than authorities.
        sets.retain(|_, before| before.is_subset(&trusted));
        sets.insert(credential, trusted);
        credential
    }

    /// Whether what was taken with this credential is still good.
    pub fn takes(&self, credential: Credential) -> bool {
        self.0.lock().contains_key(&credential)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_added_ends_nothing_and_who_is_removed_does() {
        let authorities = Authorities::default();
        let (a, b, c): (&[u8], &[u8], &[u8]) = (b"a", b"b", b"c");
        let first = authorities.set([a]);
        assert_eq!(authorities.set([a, a]), first, "they are the same");
        let both = authorities.set([b, a]);
        assert_eq!(authorities.set([a, b]), both, "in any order");
        assert!(authorities.takes(first) && authorities.takes(both));
        let other = authorities.set([a, c]);
        assert!(authorities.takes(first) && authorities.takes(other) && !authorities.takes(both));
        authorities.set([c]);
        assert!(!authorities.takes(first) && !authorities.takes(other));
        assert!(!authorities.takes(Credential::default()));
        for nth in 0..100_u8 {
            authorities.set([[nth].as_slice()]);
        }
        assert_eq!(authorities.0.lock().len(), 1, "nothing piles up");
    }
}
