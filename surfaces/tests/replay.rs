//! The surfaces over the corpus of `fuzz/`, over bent copies of it, and over random bytes; `PROPTEST_CASES` says how often.

use std::path::Path;

use proptest::prelude::*;
use surfaces::{SURFACES, run};

/// The inputs of a surface that are kept in the repository.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let read = |file: std::io::Result<std::fs::DirEntry>| std::fs::read(file.expect("an entry").path());
    files.map(|file| read(file).expect("an input")).collect()
}

#[test]
fn the_corpus() {
    for (name, surface) in SURFACES {
        let inputs = corpus(name);
        assert!(!inputs.is_empty(), "{name} has no corpus");
        inputs.iter().for_each(|input| surface(input));
    }
}

proptest! {
    #[test]
    fn any_bytes(which in 0..SURFACES.len(), bytes: Vec<u8>) {
        run(SURFACES[which].0, &bytes);
    }

    #[test]
    fn bent_inputs(
        which in 0..SURFACES.len(),
        one: prop::sample::Index,
        other: prop::sample::Index,
        bends in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0_u8..5), 1..6),
    ) {
        let (name, surface) = SURFACES[which];
        let inputs = corpus(name);
        let (mut bytes, other) = (one.get(&inputs).clone(), other.get(&inputs));
        for (at, byte, how) in bends {
            if bytes.is_empty() {
                bytes.push(byte);
                continue;
            }
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => bytes.truncate(at),
                2 => bytes.insert(at, byte),
                3 => drop(bytes.remove(at)),
                _ => bytes.extend(&other[other.len().min(at)..]),
            }
        }
        surface(&bytes);
    }
}
