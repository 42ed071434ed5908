//! Rows that are on disk in the journal, and not in the log's file yet.
//!
//! Reads look here first. Whoever reads takes this before a snapshot of the file: rows go from here when the file has them. Pure.

use std::sync::Arc;

use super::super::Position;

/// Rows that follow each other up to the end of the log. Cheap to clone. The first may have entries that the file has, too: it is the file's last row, grown.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending(Arc<Vec<Row>>);

#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) first: Position,
    pub(super) bytes: Arc<[u8]>,
}

impl Pending {
    /// Adds a row at the end, or puts it in place of the last if it begins where that does.
    pub(super) fn put(&mut self, row: Row) {
        let rows = Arc::make_mut(&mut self.0);
        debug_assert!(rows.last().is_none_or(|last| last.first <= row.first), "rows come in their order");
        match rows.last_mut() {
            Some(last) if last.first == row.first => *last = row,
            _ => rows.push(row),
        }
    }

    /// Takes out what the file has by now. Its last row stays if it grew since.
    pub(super) fn remove(&mut self, filed: &Self) {
        let Some(last) = filed.0.last() else { return };
        let stays = |row: &Row| row.first > last.first || (row.first == last.first && row.bytes != last.bytes);
        Arc::make_mut(&mut self.0).retain(stays);
    }

    /// The row that has the entry at this position, if it is one of these.
    pub(super) fn row_of(&self, position: Position) -> Option<&Row> {
        let following = self.0.partition_point(|row| row.first <= position);
        self.0.get(following.checked_sub(1)?)
    }

    /// Position of the first row's first entry.
    pub(super) fn first(&self) -> Option<Position> {
        self.0.first().map(|row| row.first)
    }

    /// From the row that has this position on.
    pub(super) fn rows_from(&self, position: Position) -> &[Row] {
        let following = self.0.partition_point(|row| row.first <= position);
        &self.0[following.saturating_sub(1)..]
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(first: u64, bytes: &[u8]) -> Row {
        Row { first: Position(first), bytes: bytes.into() }
    }

    #[test]
    fn a_row_that_grows_takes_its_own_place() {
        let mut pending = Pending::default();
        assert!(pending.is_empty() && pending.row_of(Position(9)).is_none());
        pending.put(row(5, b"a"));
        let before = pending.clone();
        pending.put(row(5, b"ab"));
        pending.put(row(7, b"c"));
        assert_eq!(before.row_of(Position(6)).map(|row| &*row.bytes), Some(b"a".as_slice()), "as it was");
        let found = [4, 5, 6, 7, 8].map(|position| pending.row_of(Position(position)).map(|row| row.first.0));
        assert_eq!(found, [None, Some(5), Some(5), Some(7), Some(7)]);
        assert_eq!(pending.first(), Some(Position(5)));
        assert_eq!(pending.rows().len(), 2);
    }

    #[test]
    fn what_the_file_has_goes_and_what_came_since_stays() {
        let mut pending = Pending::default();
        pending.remove(&Pending::default());
        pending.put(row(5, b"a"));
        pending.put(row(7, b"c"));
        let filed = pending.clone();
        let firsts = |pending: &Pending| pending.rows().iter().map(|row| row.first.0).collect::<Vec<_>>();
        let mut as_it_was = pending.clone();
        as_it_was.remove(&filed);
        assert!(as_it_was.is_empty());
        pending.put(row(7, b"cd"));
        pending.put(row(9, b"e"));
        pending.remove(&filed);
        assert_eq!(firsts(&pending), [7, 9]);
        pending.remove(&filed);
        assert_eq!(firsts(&pending), [7, 9], "nothing that it did not have");
    }
}
