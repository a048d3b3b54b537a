//! `strftime` for chat templates that print the date. Universal time and English names; no other locale.

/// A moment split into what is printed. Days are of the proleptic Gregorian calendar.
struct Moment {
    year: i64,
    month: usize,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
    /// 0 is Sunday.
    weekday: usize,
    /// 1 is the first of January.
    day_of_year: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
/// Days before each month of a common year.
const DAYS_BEFORE: [i64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];

/// `pattern` with the moment's numbers and names. A directive that is not known stays as it is.
pub(crate) fn strftime(unix_seconds: i64, pattern: &str) -> String {
    let moment = Moment::at(unix_seconds);
    let mut text = String::new();
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once('%') {
        text.push_str(before);
        let unpadded = after.strip_prefix('-');
        let directive = unpadded.unwrap_or(after).chars().next();
        let field = directive.and_then(|directive| moment.field(directive));
        match (directive, field, unpadded) {
            (Some(directive), Some(field), None) => {
                text.push_str(&field);
                rest = &after[directive.len_utf8()..];
            }
            (Some(directive), Some(field), Some(unpadded)) => {
                let digits = field.trim_start_matches('0');
                text.push_str(if digits.is_empty() { "0" } else { digits });
                rest = &unpadded[directive.len_utf8()..];
            }
            _ => {
                text.push('%');
                rest = after;
            }
        }
    }
    text + rest
}

impl Moment {
    fn at(unix_seconds: i64) -> Self {
        let (days, seconds) = (unix_seconds.div_euclid(86_400), unix_seconds.rem_euclid(86_400));
        // 400 years have 146 097 days; counting them from 1970 leaves few years to walk.
        let mut year = 1970 + 400 * days.div_euclid(146_097);
        let mut day = days.rem_euclid(146_097);
        while day >= year_length(year) {
            day -= year_length(year);
            year += 1;
        }
        let leap_day = |month: usize| i64::from(month >= 2 && year_length(year) == 366);
        let month = (0..12).rfind(|month| DAYS_BEFORE[*month] + leap_day(*month) <= day);
        let month = month.expect("invariant: the first month starts at day 0");
        Self {
            year,
            month,
            day: day - DAYS_BEFORE[month] - leap_day(month) + 1,
            hour: seconds / 3600,
            minute: seconds / 60 % 60,
            second: seconds % 60,
            weekday: (days + 4).rem_euclid(7) as usize,
            day_of_year: day + 1,
        }
    }

    fn field(&self, directive: char) -> Option<String> {
        Some(match directive {
            'Y' => self.year.to_string(),
            'y' => format!("{:02}", self.year.rem_euclid(100)),
            'm' => format!("{:02}", self.month + 1),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'H' => format!("{:02}", self.hour),
            'I' => format!("{:02}", (self.hour + 11) % 12 + 1),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            'j' => format!("{:03}", self.day_of_year),
            'p' => (if self.hour < 12 { "AM" } else { "PM" }).to_owned(),
            'B' => MONTHS[self.month].to_owned(),
            'b' => MONTHS[self.month][..3].to_owned(),
            'A' => WEEKDAYS[self.weekday].to_owned(),
            'a' => WEEKDAYS[self.weekday][..3].to_owned(),
            'F' => format!("{}-{:02}-{:02}", self.year, self.month + 1, self.day),
            'T' => format!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second),
            'Z' => "UTC".to_owned(),
            'z' => "+0000".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

fn year_length(year: i64) -> i64 {
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    if is_leap { 366 } else { 365 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values by Python's `datetime.fromtimestamp(t, timezone.utc).strftime(...)`.
    #[test]
    fn known_moments() {
        let pattern = "%Y-%m-%d %H:%M:%S %A %a %B %b %j %y %I %p %% %-d %-H %e";
        let cases = [
            (0, "1970-01-01 00:00:00 Thursday Thu January Jan 001 70 12 AM % 1 0  1"),
            (951_782_399, "2000-02-28 23:59:59 Monday Mon February Feb 059 00 11 PM % 28 23 28"),
            (951_868_799, "2000-02-29 23:59:59 Tuesday Tue February Feb 060 00 11 PM % 29 23 29"),
            (1_735_646_400, "2024-12-31 12:00:00 Tuesday Tue December Dec 366 24 12 PM % 31 12 31"),
            (4_107_542_400, "2100-03-01 00:00:00 Monday Mon March Mar 060 00 12 AM % 1 0  1"),
            (-1, "1969-12-31 23:59:59 Wednesday Wed December Dec 365 69 11 PM % 31 23 31"),
        ];
        for (unix_seconds, expected) in cases {
            assert_eq!(strftime(unix_seconds, pattern), expected);
        }
    }

    #[test]
    fn odd_patterns_stay_as_they_are() {
        assert_eq!(strftime(0, "é%Qé%é% %-Q %"), "é%Qé%é% %-Q %");
        assert_eq!(strftime(0, "%F %T %-j"), "1970-01-01 00:00:00 1");
        strftime(i64::MAX, "%Y");
        strftime(i64::MIN, "%Y");
    }
}
