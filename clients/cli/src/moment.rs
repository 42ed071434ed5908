//! Times as people write and read them, in this machine's time zone.

use chat_client::Timestamp;
use jiff::tz::TimeZone;
use jiff::{Span, ZonedDateTime, civil};

/// From when on.
#[derive(Clone, Debug)]
pub(crate) enum Since {
    /// So long ago.
    Ago(Span),
    /// A moment anywhere.
    Moment(jiff::Timestamp),
    /// A day and time here.
    DateTime(civil::DateTime),
    /// A time today.
    Today(civil::Time),
}

impl Since {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if let Ok(span) = text.parse::<Span>() {
            // `-2h` and `2h` are both two hours ago.
            return Ok(Self::Ago(span.abs()));
        }
        if let Ok(moment) = text.parse() {
            return Ok(Self::Moment(moment));
        }
        if let Ok(date) = text.parse::<civil::DateTime>() {
            return Ok(Self::DateTime(date));
        }
        if let Ok(time) = text.parse() {
            return Ok(Self::Today(time));
        }
        Err("a duration (90m, 2h, 3d), a time of today (10:30), a day (2026-11-25) or both (2026-11-25T10:30)"
            .to_owned())
    }

    /// As the server counts.
    pub(crate) fn at(&self, now: &ZonedDateTime) -> Result<Timestamp, String> {
        let moment = match self {
            Self::Ago(span) => now.checked_sub(*span).map(|then| then.timestamp()),
            Self::Moment(moment) => Ok(*moment),
            Self::DateTime(date) => date.to_zoned_datetime(now.time_zone().clone()).map(|then| then.timestamp()),
            Self::Today(time) => {
                now.date().to_datetime(*time).to_zoned_datetime(now.time_zone().clone()).map(|then| then.timestamp())
            }
        };
        let moment = moment.map_err(|error| error.to_string())?;
        Ok(Timestamp::from_ms(u64::try_from(moment.as_millisecond()).unwrap_or(0)))
    }
}

/// `12:03` today, `2026-11-25 12:03` on other days.
pub(crate) fn shown(at: Timestamp, now: &ZonedDateTime) -> String {
    let moment = i64::try_from(at.as_ms()).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    // Only a server that is out of its mind names such a time.
    let Some(moment) = moment else { return "at no time".to_owned() };
    let then = moment.to_zoned_datetime(now.time_zone().clone());
    let form = if then.date() == now.date() { "%H:%M" } else { "%Y-%m-%d %H:%M" };
    then.strftime(form).to_string()
}

/// Now, here.
pub(crate) fn now() -> ZonedDateTime {
    ZonedDateTime::now().with_time_zone(TimeZone::system())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noon() -> ZonedDateTime {
        "2026-11-26T12:00[Europe/Berlin]".parse().unwrap()
    }

    fn at(text: &str) -> String {
        let at = Since::parse(text).unwrap().at(&noon()).unwrap();
        jiff::Timestamp::from_millisecond(at.as_ms().try_into().unwrap()).unwrap().to_string()
    }

    #[test]
    fn people_write_times_in_many_ways() {
        for (text, moment) in [
            ("2h", "2026-11-26T09:00:00Z"),
            ("90m", "2026-11-26T09:30:00Z"),
            ("-1h30m", "2026-11-26T09:30:00Z"),
            ("3d", "2026-11-23T11:00:00Z"),
            ("2 weeks", "2026-11-12T11:00:00Z"),
            ("10:30", "2026-11-26T09:30:00Z"),
            ("2026-11-25", "2026-11-24T23:00:00Z"),
            ("2026-11-25T10:30", "2026-11-25T09:30:00Z"),
            ("2026-11-25 10:30", "2026-11-25T09:30:00Z"),
            ("2026-11-25T10:30Z", "2026-11-25T10:30:00Z"),
            ("2026-11-25T10:30+05:00", "2026-11-25T05:30:00Z"),
            // Before there were computers.
            ("1900-01-01", "1970-01-01T00:00:00Z"),
        ] {
            assert_eq!(at(text), moment, "{text}");
        }
        for text in ["", "soon", "25:00", "2026-13-01"] {
            assert!(Since::parse(text).unwrap_err().contains("2h"), "{text}");
        }
    }

    #[test]
    fn today_has_no_date() {
        let at = |text: &str| {
            let moment: jiff::Timestamp = text.parse().unwrap();
            shown(Timestamp::from_ms(moment.as_millisecond().try_into().unwrap()), &noon())
        };
        assert_eq!(at("2026-11-26T11:03:59Z"), "12:03");
        assert_eq!(at("2026-11-25T23:30:00Z"), "00:30");
        assert_eq!(at("2026-11-25T22:30:00Z"), "2026-11-25 23:30");
        assert_eq!(shown(Timestamp::from_ms(u64::MAX), &noon()), "at no time");
    }
}
