//! The command line.

use std::time::Duration;

pub const HELP: &str = "\
Usage: cargo bench --bench compare -- [OPTIONS]

  --rounds N            rounds of each row (default 40)
  --only TEXT[,TEXT]    only rows whose name contains one of the texts
  --json                one JSON object a row instead of the table; notes go to stderr
  --quick               3 rounds
  --test                one tiny round, to see that every row works (the default without cargo's --bench)
  --help                this text
";

const ROUNDS: usize = 40;
const QUICK_ROUNDS: usize = 3;
/// A turn is two spans: one timed as a whole, one call by call.
const SPAN: Duration = Duration::from_millis(8);
const TEST_SPAN: Duration = Duration::from_micros(200);

#[derive(Debug)]
pub enum Command {
    Help,
    Run(Options),
}

#[derive(Debug)]
pub struct Options {
    pub rounds: usize,
    pub span: Duration,
    /// Parts of row names; empty means all rows.
    pub only: Vec<String>,
    pub json: bool,
    pub test: bool,
}

pub fn parse(arguments: &[String]) -> Result<Command, String> {
    let (mut rounds, mut only) = (None, Vec::new());
    let (mut json, mut quick, mut test, mut cargo_bench) = (false, false, false, false);
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let (option, inline) = match argument.split_once('=') {
            Some((option, value)) if option.starts_with("--") => (option, Some(value)),
            _ => (argument.as_str(), None),
        };
        let mut value = || {
            inline
                .map(str::to_owned)
                .or_else(|| arguments.next().cloned())
                .ok_or_else(|| format!("{option} needs a value"))
        };
        match option {
            "--rounds" => {
                let text = value()?;
                let count = text.parse().ok().filter(|&count| count > 0);
                rounds = Some(count.ok_or_else(|| format!("--rounds needs a number above 0, not '{text}'"))?);
            }
            "--only" => {
                only.extend(value()?.split(',').map(str::to_owned).filter(|text| !text.is_empty()));
                if only.is_empty() {
                    return Err("--only needs at least one text".into());
                }
            }
            _ if inline.is_some() => return Err(format!("unknown option '{argument}'")),
            "--json" => json = true,
            "--quick" => quick = true,
            "--test" => test = true,
            "--bench" => cargo_bench = true,
            "--help" | "-h" => return Ok(Command::Help),
            _ => return Err(format!("unknown option '{argument}'")),
        }
    }
    // `cargo bench` passes --bench; `cargo test --benches` passes nothing, and wants to know only that it works.
    let test = test || (!cargo_bench && !quick && rounds.is_none());
    let (usual_rounds, span) = match (test, quick) {
        (true, _) => (1, TEST_SPAN),
        (_, true) => (QUICK_ROUNDS, SPAN),
        _ => (ROUNDS, SPAN),
    };
    Ok(Command::Run(Options { rounds: rounds.unwrap_or(usual_rounds), span, only, json, test }))
}
