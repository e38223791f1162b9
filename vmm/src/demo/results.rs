//! What a demo run found, and how it is told: each step as it happens, then a table or one JSON object.

use std::fmt::Write as _;
use std::time::Instant;

use serde_json::{Map, Value, json};

/// Collects steps, checks and figures of one run.
pub(crate) struct Results {
    start: Instant,
    quiet: bool,
    steps: Vec<(String, f64)>,
    checks: Map<String, Value>,
    figures: Map<String, Value>,
    failures: Vec<String>,
}

impl Results {
    /// A run that began at `start`. `quiet` prints nothing while it goes on.
    #[must_use]
    pub(crate) fn new(start: Instant, quiet: bool) -> Self {
        Self {
            start,
            quiet,
            steps: Vec::new(),
            checks: Map::new(),
            figures: Map::new(),
            failures: Vec::new(),
        }
    }

    /// A step is done: `name` is its key in `timings_ms`, `text` what a person reads.
    #[expect(clippy::print_stdout, reason = "the command's output")]
    pub(crate) fn step(&mut self, name: &str, text: &str) {
        let at = self.start.elapsed().as_secs_f64() * 1e3;
        if !self.quiet {
            println!("{at:8.1} ms  {text}");
        }
        self.steps.push((name.to_owned(), at));
    }

    /// Records a check's outcome; `why` is told when it failed.
    #[expect(clippy::print_stdout, reason = "the command's output")]
    pub(crate) fn check(&mut self, name: &str, outcome: Result<(), String>) {
        // A check made in two parts holds only if both do.
        let so_far = self.checks.get(name) != Some(&Value::Bool(false));
        self.checks.insert(name.to_owned(), json!(so_far && outcome.is_ok()));
        if let Err(why) = outcome {
            if !self.quiet {
                println!("       FAILED  {name}: {why}");
            }
            self.failures.push(format!("{name}: {why}"));
        }
    }

    /// Whether a check of that name was made.
    #[must_use]
    pub(crate) fn has_check(&self, name: &str) -> bool {
        self.checks.contains_key(name)
    }

    /// Records a figure of the JSON object.
    pub(crate) fn figure(&mut self, name: &str, value: Value) {
        self.figures.insert(name.to_owned(), value);
    }

    /// What failed, check by check.
    #[must_use]
    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }

    /// The one-line JSON object.
    #[must_use]
    pub(crate) fn json(&self) -> Value {
        let mut object = self.figures.clone();
        object.extend(self.checks.clone());
        let timings: Map<String, Value> = self
            .steps
            .iter()
            .map(|(name, at)| (name.clone(), json!((at * 10.0).round() / 10.0)))
            .collect();
        object.insert("timings_ms".to_owned(), Value::Object(timings));
        Value::Object(object)
    }

    /// The table for a person.
    #[must_use]
    pub(crate) fn table(&self) -> String {
        let mut text = String::from("\nstep                     at (ms)   took (ms)\n");
        let mut before = 0.0;
        for (name, at) in &self.steps {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<22} {at:>9.1}  {:>10.1}", at - before);
            before = *at;
        }
        text.push('\n');
        for (name, value) in self.figures.iter().chain(&self.checks) {
            let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = writeln!(text, "{name:<22} {shown}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_holds_checks_figures_and_timings() {
        let mut r = Results::new(Instant::now(), true);
        r.step("booted", "the pod runs");
        r.check("fs_ok", Ok(()));
        r.check("blk_ok", Err("sector 7 differs".into()));
        r.figure("vcpus", json!(1));
        let j = r.json();
        assert_eq!(
            (&j["fs_ok"], &j["blk_ok"], &j["vcpus"]),
            (&json!(true), &json!(false), &json!(1))
        );
        assert!(j["timings_ms"]["booted"].is_number());
        assert_eq!(r.failures(), ["blk_ok: sector 7 differs"]);
        assert!(r.table().contains("booted") && r.table().contains("blk_ok"));
    }
}
