//! docs/reference/topics.md contains the rules about the topics' settings.

use std::fmt::Write;

use payment_writer::kafka::topic_rules::{Action, RULES, Refused, Rule};

use super::generated;

#[test]
fn the_topics_page_matches_the_rules() {
    let mut table =
        String::from("| topics | setting | must not | set | otherwise | is |\n| - | - | - | - | - | - |\n");
    for Rule { roles, setting, refused, wanted, action, consequence } in RULES {
        let roles: Vec<&str> = roles.iter().map(|role| (*role).into()).collect();
        let is = match action {
            Action::Refuse => "refused",
            Action::Warn => "warned of",
        };
        let roles = roles.join("`, `");
        let refused = match refused {
            Refused::Word(word) => format!("contain `{word}`"),
            Refused::Above(most) => format!("be above `{most}`"),
        };
        writeln!(table, "| `{roles}` | `{setting}` | {refused} | `{wanted}` | {consequence} | {is} |")
            .unwrap();
    }
    generated::check("docs/reference/topics.md", &table);
}
