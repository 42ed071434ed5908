//! Rows that are drawn anew from their beginning, because a terminal may take them for wider or narrower than they are.
//!
//! How wide an emoji, a flag or a letter of some scripts is, terminals do not agree on, and what they believe cannot be asked. Where such a one stands or stood, cells beside it
//! may hold what nobody drew there. Invariant: of a row that has or had one and changes, every cell is written; those that one is to cover are emptied before.

use ratatui::buffer::{Buffer, CellDiffOption};

use super::wrap;

/// The screen as it was drawn last.
#[derive(Debug, Default)]
pub(super) struct Repaint {
    last: Buffer,
}

impl Repaint {
    /// Marks what has to be written of a screen whatever was there; the cells, by column and row, that have to be emptied before.
    pub(super) fn cells(&mut self, screen: &mut Buffer) -> Vec<(u16, u16)> {
        let last = std::mem::replace(&mut self.last, screen.clone());
        let is_resized = last.area != screen.area;
        let columns = usize::from(screen.area.width).max(1);
        let mut covered = Vec::new();
        for (y, row) in (0_u16..).zip(screen.content.chunks_mut(columns)) {
            let before = last.content.chunks(columns).nth(usize::from(y)).filter(|_| !is_resized).unwrap_or_default();
            let has_doubtful = [before, &*row].into_iter().flatten().any(|cell| is_doubtful(cell.symbol()));
            if !has_doubtful || before == &*row {
                continue;
            }
            for (x, cell) in (0_u16..).zip(row) {
                cell.set_diff_option(CellDiffOption::AlwaysUpdate);
                if cell.symbol().len() > 1 {
                    let width = u16::try_from(wrap::grapheme_columns(cell.symbol())).unwrap_or(1);
                    covered.extend((x + 1..x.saturating_add(width)).map(|x| (x, y)));
                }
            }
        }
        covered
    }
}

/// Whether terminals may differ about its width.
fn is_doubtful(symbol: &str) -> bool {
    symbol.len() > 1 && (symbol.chars().nth(1).is_some() || wrap::grapheme_columns(symbol) != 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(lines: [&str; 3]) -> Buffer {
        Buffer::with_lines(lines)
    }

    #[test]
    fn rows_with_flags_that_change() {
        let mut repaint = Repaint::default();
        let plain = ["one        ", "two        ", "three      "];
        let none: [(u16, u16); 0] = [];
        let is_marked = |screen: &Buffer, row: usize| {
            let marked = screen.content[row * 11..row * 11 + 11].iter();
            let marked = marked.filter(|cell| cell.diff_option == CellDiffOption::AlwaysUpdate).count();
            assert!(marked == 0 || marked == 11);
            marked > 0
        };
        assert_eq!(repaint.cells(&mut screen(plain)), none);
        let flag = ["one        ", "a 🇩🇪 flag  ", "three      "];
        let mut with_flag = screen(flag);
        assert_eq!(repaint.cells(&mut with_flag), [(3, 1)]);
        assert!(is_marked(&with_flag, 1) && !is_marked(&with_flag, 0) && !is_marked(&with_flag, 2));
        let mut same = screen(flag);
        assert_eq!(repaint.cells(&mut same), none);
        assert!(!is_marked(&same, 1), "nothing changed");
        let mut gone = screen(plain);
        assert_eq!(repaint.cells(&mut gone), none);
        assert!(is_marked(&gone, 1), "where one was");
        let mut narrow = screen(["ONE        ", "two        ", "✓ │ ● grün "]);
        assert_eq!(repaint.cells(&mut narrow), none);
        assert!((0..3).all(|row| !is_marked(&narrow, row)));
        let mut marks = screen(["e\u{301}          ", "你         ", "three      "]);
        assert_eq!(repaint.cells(&mut marks), [(1, 1)]);
        assert!((0..2).all(|row| is_marked(&marks, row)));
    }
}
