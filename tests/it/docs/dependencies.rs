//! docs/reference/dependencies.md contains the list of what the daemon depends on.

use std::fmt::Write;

use payment_writer::dependencies::{Dependency, Fact, Told};
use strum::VariantArray;

use super::generated;

#[test]
fn the_dependencies_page_matches_the_list() {
    let mut table = String::from(
        "| dependency | the daemon is told by | does | says, or what it depends on | answered by |\n\
         | - | - | - | - | - |\n",
    );
    for dependency in Dependency::VARIANTS {
        let Fact { told, does, says, remedy } = dependency.fact();
        let told = match told {
            Told::Checks(when) => {
                let when: Vec<&str> = when.iter().map(|when| (*when).into()).collect();
                format!("its own check {}", when.join(", "))
            }
            Told::Kafka(code) => format!("the brokers' error {code:?}"),
            Told::Postgres(sqlstate) => format!("SQLSTATE {sqlstate}"),
            Told::Nothing => "nothing, only `doctor` checks".to_owned(),
        };
        let says = says.replace(&uuid::Uuid::nil().to_string(), "ID");
        let (name, does): (&str, &str) = (dependency.name(), does.into());
        let is_command =
            ["ALTER ", "kafka-", "payment-writer ", "psql "].iter().any(|word| remedy.starts_with(word));
        let quote = if is_command { "`" } else { "" };
        writeln!(table, "| `{name}` | {told} | {does} | {says} | {quote}{remedy}{quote} |").unwrap();
    }
    generated::check("docs/reference/dependencies.md", &table);
}
