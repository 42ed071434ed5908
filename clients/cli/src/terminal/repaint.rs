//! Rows that are drawn anew from their beginning, because a terminal may take them for wider or narrower than they are.
//!
//! How wide an emoji, a flag or a letter of some scripts is, terminals do not agree on, and what they believe cannot be asked. Where such a one stands or stood, cells beside it
//! may hold what nobody drew there. Invariant: a row that has or had one and changes is cleared, and every cell of it written.

use ratatui::buffer::{Buffer, CellDiffOption};

use super::wrap;

/// The screen as it was drawn last.
#[derive(Debug, Default)]
pub(super) struct Repaint {
    last: Buffer,
}

impl Repaint {
    /// Marks what has to be written of a screen whatever was there; the rows that have to be cleared before.
    pub(super) fn rows(&mut self, screen: &mut Buffer) -> Vec<u16> {
        let last = std::mem::replace(&mut self.last, screen.clone());
        let is_resized = last.area != screen.area;
        let columns = usize::from(screen.area.width);
        let mut rows = Vec::new();
        for (y, row) in (0..).zip(screen.content.chunks_mut(columns.max(1))) {
            let before =
                last.content.chunks(columns.max(1)).nth(usize::from(y)).filter(|_| !is_resized).unwrap_or_default();
            let has_doubtful = [before, &*row].into_iter().flatten().any(|cell| is_doubtful(cell.symbol()));
            if has_doubtful && before != &*row {
                for cell in row {
                    cell.set_diff_option(CellDiffOption::AlwaysUpdate);
                }
                rows.push(y);
            }
        }
        rows
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
        assert_eq!(repaint.rows(&mut screen(plain)), [0_u16; 0]);
        let flag = ["one        ", "a 🇩🇪 flag  ", "three      "];
        let mut with_flag = screen(flag);
        assert_eq!(repaint.rows(&mut with_flag), [1]);
        assert!(with_flag.content[11..22].iter().all(|cell| cell.diff_option == CellDiffOption::AlwaysUpdate));
        assert!(with_flag.content[..11].iter().all(|cell| cell.diff_option == CellDiffOption::None));
        assert_eq!(repaint.rows(&mut screen(flag)), [0_u16; 0], "nothing changed");
        assert_eq!(repaint.rows(&mut screen(plain)), [1], "where one was");
        assert_eq!(repaint.rows(&mut screen(["ONE        ", "two        ", "✓ │ ● grün "])), [0_u16; 0]);
        assert_eq!(repaint.rows(&mut screen(["e\u{301}         ", "你         ", "three      "])), [0, 1]);
    }
}
