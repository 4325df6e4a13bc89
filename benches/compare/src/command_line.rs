//! The command line of every bench here: sections to run, and options.

use std::fmt::Write;

/// What a bench accepts.
pub struct Usage {
    pub bench: &'static str,
    /// Name and one line each; none on the command line means all.
    pub sections: &'static [(&'static str, &'static str)],
    /// Beyond those that every bench has.
    pub options: &'static [Accepted],
}

/// An option that one bench has.
pub struct Accepted {
    /// With its dashes.
    pub name: &'static str,
    /// What its value is called; `None` for a switch.
    pub value: Option<&'static str>,
    pub help: &'static str,
}

#[derive(Debug)]
pub enum Command {
    Help,
    Run(Options),
}

#[derive(Debug)]
pub struct Options {
    sections: Vec<&'static str>,
    /// How many rounds were asked for.
    rounds: Option<usize>,
    /// One tiny round, to see that everything works.
    pub test: bool,
    given: Vec<(&'static str, String)>,
}

impl Options {
    pub fn wants(&self, section: &str) -> bool {
        self.sections.contains(&section)
    }

    /// The rounds asked for, or so many; one in a test.
    pub fn rounds(&self, usual: usize) -> usize {
        self.rounds.unwrap_or(if self.test { 1 } else { usual })
    }

    pub fn has(&self, option: &str) -> bool {
        self.given.iter().any(|(name, _)| *name == option)
    }

    /// The values of an option that may be given several times.
    pub fn values(&self, option: &str) -> impl Iterator<Item = &str> {
        self.given.iter().filter(move |(name, _)| *name == option).map(|(_, value)| value.as_str())
    }
}

const COMMON: &[Accepted] = &[
    Accepted { name: "--rounds", value: Some("N"), help: "rounds of each section" },
    Accepted {
        name: "--test",
        value: None,
        help: "one tiny round, to see that everything works (the default without cargo's --bench)",
    },
    Accepted { name: "--help", value: None, help: "this text" },
];

impl Usage {
    pub fn help(&self) -> String {
        let mut text =
            format!("Usage: cargo bench --bench {} -- [SECTION..] [OPTION..]\n\nSections:\n", self.bench);
        for (name, what) in self.sections {
            let _ = writeln!(text, "  {name:<20} {what}");
        }
        text.push_str("\nOptions:\n");
        for option in self.options.iter().chain(COMMON) {
            let name = [Some(option.name), option.value].into_iter().flatten().collect::<Vec<_>>().join(" ");
            let _ = writeln!(text, "  {name:<20} {}", option.help);
        }
        text
    }

    pub fn parse(&self, arguments: &[String]) -> Result<Command, String> {
        let mut options = Options { sections: Vec::new(), rounds: None, test: false, given: Vec::new() };
        let mut cargo_bench = false;
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            if !argument.starts_with('-') {
                let section = self.sections.iter().find(|(name, _)| name == argument);
                let (name, _) = section.ok_or_else(|| format!("no section '{argument}'"))?;
                options.sections.push(name);
                continue;
            }
            let (name, inline) = match argument.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (argument.as_str(), None),
            };
            if name == "--bench" {
                cargo_bench = true;
                continue;
            }
            let mut accepted = self.options.iter().chain(COMMON);
            let accepted =
                accepted.find(|option| option.name == name).ok_or(format!("no option '{name}'"))?;
            let value = match (accepted.value, inline) {
                (None, None) => String::new(),
                (None, Some(_)) => return Err(format!("{name} takes no value")),
                (Some(_), Some(value)) => value.to_owned(),
                (Some(what), None) => arguments.next().ok_or(format!("{name} needs {what}"))?.clone(),
            };
            match name {
                "--help" => return Ok(Command::Help),
                "--test" => options.test = true,
                "--rounds" => {
                    let count = value.parse().ok().filter(|&count| count > 0);
                    let count =
                        count.ok_or_else(|| format!("--rounds needs a number above 0, not '{value}'"))?;
                    options.rounds = Some(count);
                }
                _ => options.given.push((accepted.name, value)),
            }
        }
        if options.sections.is_empty() {
            options.sections = self.sections.iter().map(|(name, _)| *name).collect();
        }
        // `cargo bench` passes --bench; `cargo test --benches` passes nothing, and wants to know only that it works.
        options.test |= !cargo_bench && options.rounds.is_none();
        Ok(Command::Run(options))
    }
}
