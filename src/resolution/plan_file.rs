//! The text of a plan: a header, and one line for each halted partition. Pure.

use std::fmt::{self, Display};
use std::str::FromStr;

use uuid::Uuid;

use super::HaltResolution;
use crate::domain::record::{NextOffset, Partition};

const ABOUT: &str = "\
# Halted partitions, and a decision for each that loses no payment and sends no event twice, if there is one.
# Review it, keep it, and apply all of it: payment-writer cursors apply FILE
# Lines that begin with # are ignored: their partitions stay halted. To decide one of them yourself, remove
# the # and replace `none` by `accept --published OFFSET` or `skip --to OFFSET`.";
const EXPECTED: &str = "expected partition=N applied=OFFSET published=OFFSET group=OFFSET halt_reason=NAME, then \
                        accept --published OFFSET or skip --to OFFSET, then # and the reason";

/// What a plan belongs to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// `kafka.group_id`
    pub group: String,
    /// `kafka.input_topic`
    pub topic: String,
    /// Id of the input topic.
    pub topic_id: Uuid,
    /// Id of the database.
    pub database_id: Uuid,
}

impl Header {
    /// Names and values, in the order of the file.
    pub fn fields(&self) -> [(&'static str, String); 4] {
        [
            ("group", self.group.clone()),
            ("topic", self.topic.clone()),
            ("topic_id", self.topic_id.to_string()),
            ("database_id", self.database_id.to_string()),
        ]
    }
}

/// The state of a halted partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// Next offset to write.
    pub applied: Option<NextOffset>,
    /// Next offset to publish, as last copied to the database.
    pub published: Option<NextOffset>,
    /// The group's offset.
    pub group: Option<NextOffset>,
    /// Label of the halt reason.
    pub halt_reason: String,
}

impl Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [applied, published, group] = [self.applied, self.published, self.group]
            .map(|offset| offset.map_or_else(|| "-".to_owned(), |offset| offset.to_string()));
        write!(f, "applied={applied} published={published} group={group} halt_reason={}", self.halt_reason)
    }
}

/// A halted partition in a plan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlanLine {
    /// The partition.
    pub partition: Partition,
    /// Its state when the plan was made.
    pub found: Found,
    /// `None`: each decision would lose or double something. Such a line is a comment.
    pub decision: Option<HaltResolution>,
    /// Reason for the decision, or for none.
    pub why: String,
}

impl Display for PlanLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { partition, found, decision, why } = self;
        match decision {
            Some(decision) => write!(f, "partition={partition} {found} {decision} # {why}"),
            None => write!(f, "# partition={partition} {found} none # {why}"),
        }
    }
}

/// A plan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlanFile {
    /// What it belongs to.
    pub header: Header,
    /// When it was made.
    pub time: jiff::Timestamp,
    /// The halted partitions; after parsing, only those with a decision.
    pub lines: Vec<PlanLine>,
}

impl Display for PlanFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{ABOUT}")?;
        for (name, value) in self.header.fields() {
            writeln!(f, "{name}: {value}")?;
        }
        write!(f, "time: {:.0}", self.time)?;
        self.lines.iter().try_for_each(|line| write!(f, "\n{line}"))
    }
}

impl FromStr for PlanFile {
    type Err = String;

    /// The error names the line.
    fn from_str(text: &str) -> Result<Self, String> {
        let lines = text.lines().map(str::trim).enumerate();
        let mut lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        fn field<'a, T: FromStr>(
            lines: &mut impl Iterator<Item = (usize, &'a str)>,
            name: &str,
        ) -> Result<T, String> {
            let (index, line) = lines.next().unwrap_or((0, ""));
            let value = line.strip_prefix(name).and_then(|rest| rest.strip_prefix(": "));
            let value = value.and_then(|value| value.parse().ok());
            value.ok_or_else(|| format!("line {}: expected `{name}: ` and its value", index + 1))
        }
        let header = Header {
            group: field(&mut lines, "group")?,
            topic: field(&mut lines, "topic")?,
            topic_id: field(&mut lines, "topic_id")?,
            database_id: field(&mut lines, "database_id")?,
        };
        let time = field(&mut lines, "time")?;
        let mut planned: Vec<PlanLine> = Vec::new();
        for (index, line) in lines {
            let line = parsed(line).ok_or_else(|| format!("line {}: {EXPECTED}", index + 1))?;
            if planned.iter().any(|other| other.partition == line.partition) {
                return Err(format!("line {}: partition {} occurs twice", index + 1, line.partition));
            }
            planned.push(line);
        }
        Ok(Self { header, time, lines: planned })
    }
}

fn parsed(line: &str) -> Option<PlanLine> {
    let (words, why) = line.split_once(" # ")?;
    let mut words = words.split_whitespace();
    let mut field = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=');
    let offset = |text: &str| match text {
        "-" => Some(None),
        _ => at(text).map(Some),
    };
    let partition = field("partition")?.parse().ok().filter(|partition| *partition >= 0)?;
    let found = Found {
        applied: offset(field("applied")?)?,
        published: offset(field("published")?)?,
        group: offset(field("group")?)?,
        halt_reason: field("halt_reason")?.to_owned(),
    };
    let decision = match (words.next()?, words.next()?, at(words.next()?)?) {
        ("accept", "--published", published) => HaltResolution::Accept { published },
        ("skip", "--to", to) => HaltResolution::Skip { to },
        _ => return None,
    };
    let why = Some(why.trim().to_owned()).filter(|why| words.next().is_none() && !why.is_empty())?;
    Some(PlanLine { partition: Partition(partition), found, decision: Some(decision), why })
}

fn at(text: &str) -> Option<NextOffset> {
    text.parse().ok().filter(|offset| *offset >= 0).map(NextOffset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(partition: i32, decision: Option<HaltResolution>) -> PlanLine {
        let found = Found {
            applied: Some(NextOffset(20)),
            published: None,
            group: Some(NextOffset(33)),
            halt_reason: "moved_forward".to_owned(),
        };
        PlanLine { partition: Partition(partition), found, decision, why: "why # so".to_owned() }
    }

    fn plan() -> PlanFile {
        let accept = HaltResolution::Accept { published: NextOffset(20) };
        let skip = HaltResolution::Skip { to: NextOffset(33) };
        PlanFile {
            header: Header {
                group: "a group".to_owned(),
                topic: "in".to_owned(),
                topic_id: Uuid::from_u128(1),
                database_id: Uuid::from_u128(2),
            },
            time: "2026-03-01T12:00:00Z".parse().unwrap(),
            lines: vec![line(0, Some(accept)), line(1, None), line(7, Some(skip))],
        }
    }

    #[test]
    fn a_plan_is_parsed_as_it_was_printed_without_what_it_leaves_out() {
        let text = plan().to_string();
        assert!(text.contains(
            "\n# partition=1 applied=20 published=- group=33 halt_reason=moved_forward none # why # so\n"
        ));
        let mut decided = plan();
        decided.lines.remove(1);
        assert_eq!(text.parse(), Ok(decided));
    }

    #[test]
    fn an_error_names_the_line() {
        let text = plan().to_string();
        let number = text.lines().position(|line| line.starts_with("partition=0")).unwrap() + 1;
        let wrong = |from: &str, to: &str| text.replace(from, to).parse::<PlanFile>().unwrap_err();
        for (from, to) in [
            ("partition=0", "partition=-1"),
            ("partition=0 applied=20", "partition=0 applied=x"),
            ("accept --published 20", "none"),
            ("accept --published 20", "accept --published -1"),
            ("accept --published 20", "skip --published 20"),
            ("accept --published 20", "accept --published 20 --force"),
            ("accept --published 20 # why # so", "accept --published 20"),
        ] {
            let error = wrong(from, to);
            assert!(error.starts_with(&format!("line {number}: expected")), "{to}: {error}");
        }
        assert_eq!(
            wrong("partition=7", "partition=0"),
            format!("line {}: partition 0 occurs twice", number + 2)
        );
        assert!(wrong("topic_id: 0", "topic_id: x").starts_with("line 7: expected `topic_id: `"));
        assert!("".parse::<PlanFile>().unwrap_err().contains("`group: `"));
    }
}
