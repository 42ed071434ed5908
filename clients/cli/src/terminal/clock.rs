//! Times and days as they are shown.

use jiff::civil::Date;
use jiff::tz::TimeZone;

/// The hour and minute, there where the reader is.
pub(super) fn time_of_day(at_ms: u64, zone: &TimeZone) -> String {
    local(at_ms, zone).strftime("%H:%M").to_string()
}

/// The day, there where the reader is.
pub(super) fn day(at_ms: u64, zone: &TimeZone) -> Date {
    local(at_ms, zone).date()
}

/// A day's name, as it is called today.
pub(super) fn day_name(day: Date, today: Date) -> String {
    if day == today {
        return "Today".to_owned();
    }
    if today.yesterday().is_ok_and(|yesterday| yesterday == day) {
        return "Yesterday".to_owned();
    }
    day.strftime("%A, %-d %B %Y").to_string()
}

/// The hour and minute if it was today, else the day.
pub(super) fn short(at_ms: u64, today: Date, zone: &TimeZone) -> String {
    let local = local(at_ms, zone);
    if local.date() == today {
        local.strftime("%H:%M").to_string()
    } else if local.year() == today.year() {
        local.strftime("%-d %b").to_string()
    } else {
        local.strftime("%b %Y").to_string()
    }
}

/// What no calendar has becomes its beginning.
fn local(at_ms: u64, zone: &TimeZone) -> jiff::ZonedDateTime {
    let at = i64::try_from(at_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    at.unwrap_or_default().to_zoned_datetime(zone.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let today = jiff::civil::date(2027, 5, 4);
        assert_eq!(day_name(today, today), "Today");
        assert_eq!(day_name(jiff::civil::date(2027, 5, 3), today), "Yesterday");
        assert_eq!(day_name(jiff::civil::date(2027, 5, 1), today), "Saturday, 1 May 2027");
        let zone = TimeZone::UTC;
        let at_ms = 1_809_441_000_000;
        assert_eq!(time_of_day(at_ms, &zone), "14:30");
        assert_eq!(short(at_ms, today, &zone), "14:30");
        assert_eq!(short(at_ms, jiff::civil::date(2027, 7, 1), &zone), "4 May");
        assert_eq!(short(at_ms, jiff::civil::date(2028, 7, 1), &zone), "May 2027");
        assert_eq!(day(u64::MAX, &zone), jiff::civil::date(1970, 1, 1));
    }
}
