//! From a set of system calls to a classic BPF program for `seccomp(2)`. Which calls those are is not told here.
//!
//! The kernel runs a new filter once for every system call number there is, to learn which it may answer without it, so
//! what a filter costs at start is the length of a decision. A list of comparisons took 0.39 ms of a start of 1 ms; this
//! is a tree, some eight comparisons deep.

use libc::sock_filter;

/// When a call is allowed: if the low half of an argument, masked, has a value. Any one of a call's conditions is enough;
/// none at all allow it always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    /// Which argument, from 0.
    pub(super) argument: u8,
    /// The bits that are looked at.
    pub(super) mask: u32,
    /// What they must be.
    pub(super) value: u32,
}

/// Calls by number, sorted, each once, with its conditions.
pub(super) type Calls = Vec<(u32, Vec<Condition>)>;

const ARCH: u32 = 0xc000_003e; // AUDIT_ARCH_X86_64 (Linux include/uapi/linux/audit.h)
// Offsets in struct seccomp_data (Linux include/uapi/linux/seccomp.h).
const NUMBER_AT: u32 = 0;
const ARCH_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

fn instruction(code: u32, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

fn jump(code: u32, k: u32, yes: u8, no: u8) -> sock_filter {
    // Every operation code of classic BPF fits (Linux include/uapi/linux/bpf_common.h).
    let code = u16::try_from(code).unwrap_or_default();
    sock_filter {
        code,
        jt: yes,
        jf: no,
        k,
    }
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn answer(action: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, action)
}

fn equal(value: u32, yes: u8, no: u8) -> sock_filter {
    jump(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, yes, no)
}

/// What is done from one number on.
#[derive(PartialEq, Eq)]
enum Decision<'c> {
    Refuse,
    Allow,
    Check(&'c [Condition]),
}

/// The program that allows `calls` and answers all others with `refuse` (a `SECCOMP_RET_` value).
pub(super) fn program(calls: &Calls, refuse: u32) -> Vec<sock_filter> {
    let mut program = vec![load(ARCH_AT), equal(ARCH, 1, 0), answer(refuse), load(NUMBER_AT)];
    let mut segments: Vec<(u32, Decision<'_>)> = vec![(0, Decision::Refuse)];
    for (number, conditions) in calls {
        let decision = if conditions.is_empty() {
            Decision::Allow
        } else {
            Decision::Check(conditions)
        };
        begin(&mut segments, *number, decision);
        begin(&mut segments, number.saturating_add(1), Decision::Refuse);
    }
    program.extend(tree(&segments, refuse));
    program
}

/// A program on top of one that allows `calls`, in order, and no others: of those it allows the ones that come with true.
/// What lies between two calls is refused below it and may be anything here, which keeps this one short.
pub(super) fn narrower(calls: impl Iterator<Item = (u32, bool)>, refuse: u32) -> Vec<sock_filter> {
    let mut segments: Vec<(u32, Decision<'_>)> = vec![(0, Decision::Allow)];
    for (number, allowed) in calls {
        let decision = if allowed { Decision::Allow } else { Decision::Refuse };
        begin(&mut segments, number, decision);
    }
    let mut program = vec![load(NUMBER_AT)];
    program.extend(tree(&segments, refuse));
    program
}

/// Has `decision` begin at `number`, after all that is there; equal neighbours are one.
fn begin<'c>(segments: &mut Vec<(u32, Decision<'c>)>, number: u32, decision: Decision<'c>) {
    segments.pop_if(|last| last.0 == number);
    if segments.last().is_none_or(|last| last.1 != decision) {
        segments.push((number, decision));
    }
}

fn tree(segments: &[(u32, Decision<'_>)], refuse: u32) -> Vec<sock_filter> {
    let (low, high) = segments.split_at(segments.len() / 2);
    match (low, high) {
        (_, []) => vec![answer(refuse)],
        ([], [(_, decision), ..]) => leaf(decision, refuse),
        (_, [(first, _), ..]) => {
            let low = tree(low, refuse);
            let at_least = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
            // A comparison jumps over 255 instructions at most.
            let mut code = match u8::try_from(low.len()) {
                Ok(over) => vec![jump(at_least, *first, over, 0)],
                Err(_) => {
                    let over = u32::try_from(low.len()).unwrap_or(u32::MAX);
                    vec![
                        jump(at_least, *first, 0, 1),
                        instruction(libc::BPF_JMP | libc::BPF_JA, over),
                    ]
                }
            };
            code.extend(low);
            code.extend(tree(high, refuse));
            code
        }
    }
}

fn leaf(decision: &Decision<'_>, refuse: u32) -> Vec<sock_filter> {
    let conditions = match decision {
        Decision::Refuse => return vec![answer(refuse)],
        Decision::Allow => return vec![answer(libc::SECCOMP_RET_ALLOW)],
        Decision::Check(conditions) => conditions,
    };
    let mut code = Vec::new();
    for condition in *conditions {
        code.push(load(ARGUMENTS_AT + 8 * u32::from(condition.argument)));
        if condition.mask != u32::MAX {
            code.push(instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, condition.mask));
        }
        code.push(equal(condition.value, 0, 1));
        code.push(answer(libc::SECCOMP_RET_ALLOW));
    }
    code.push(answer(refuse));
    code
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | 1;

    /// Runs a program as the kernel does, on a call's number and the low halves of its arguments; also how many steps.
    fn run(program: &[sock_filter], arch: u32, number: u32, arguments: [u32; 6]) -> (u32, usize) {
        let (mut a, mut at) = (0, 0);
        for steps in 1..=program.len() {
            let i = program[at];
            at += 1;
            match u32::from(i.code) {
                0x20 => {
                    a = match i.k {
                        0 => number,
                        4 => arch,
                        k => arguments[usize::try_from((k - 16) / 8).unwrap()],
                    }
                }
                0x54 => a &= i.k,
                0x15 => at += usize::from(if a == i.k { i.jt } else { i.jf }),
                0x35 => at += usize::from(if a >= i.k { i.jt } else { i.jf }),
                0x05 => at += usize::try_from(i.k).unwrap(),
                0x06 => return (i.k, steps),
                other => panic!("no such operation in these programs: {other:#x}"),
            }
        }
        panic!("no end");
    }

    fn calls() -> impl Strategy<Value = Calls> {
        let condition = (0u8..6, any::<u32>(), any::<u32>()).prop_map(|(argument, mask, value)| Condition {
            argument,
            mask: mask | 1,
            value: value & (mask | 1),
        });
        let conditions = prop_oneof![4 => Just(Vec::new()), 1 => prop::collection::vec(condition, 1..4)];
        prop::collection::btree_map(0u32..460, conditions, 0..230).prop_map(|map| map.into_iter().collect())
    }

    proptest! {
        #[test]
        fn a_call_is_allowed_if_it_is_listed_and_meets_a_condition(
            calls in calls(), number in 0u32..470, arguments in any::<[u32; 6]>(), pick in any::<prop::sample::Index>(), met in any::<bool>(),
        ) {
            let program = program(&calls, REFUSE);
            let (mut number, mut arguments) = (number, arguments);
            if met && !calls.is_empty() {
                let (listed, conditions) = &calls[pick.index(calls.len())];
                number = *listed;
                if let Some(c) = conditions.last() {
                    let argument = &mut arguments[usize::from(c.argument)];
                    *argument = *argument & !c.mask | c.value;
                }
            }
            let allowed = calls.iter().any(|(n, conditions)| {
                let holds = |c: &Condition| arguments[usize::from(c.argument)] & c.mask == c.value;
                *n == number && (conditions.is_empty() || conditions.iter().any(holds))
            });
            prop_assert!(allowed || !met || calls.is_empty());
            let want = if allowed { libc::SECCOMP_RET_ALLOW } else { REFUSE };
            prop_assert_eq!(run(&program, ARCH, number, arguments).0, want);
            prop_assert_eq!(run(&program, 0x4000_0003, number, arguments).0, REFUSE);
            prop_assert_eq!(run(&program, ARCH, number | 0x4000_0000, arguments).0, REFUSE);
        }
    }

    proptest! {
        #[test]
        fn of_what_is_allowed_below_only_the_listed_is_allowed(
            calls in prop::collection::btree_map(0u32..460, any::<bool>(), 0..230),
        ) {
            let program = narrower(calls.iter().map(|(call, allowed)| (*call, *allowed)), REFUSE);
            for (call, allowed) in calls {
                let want = if allowed { libc::SECCOMP_RET_ALLOW } else { REFUSE };
                prop_assert_eq!(run(&program, ARCH, call, [0; 6]).0, want);
            }
        }
    }

    #[test]
    fn a_decision_is_a_few_comparisons_long() {
        let calls: Calls = (0..400).step_by(3).map(|number| (number, Vec::new())).collect();
        let program = program(&calls, REFUSE);
        let longest = (0..470).map(|number| run(&program, ARCH, number, [0; 6]).1).max();
        assert!(longest <= Some(16), "{longest:?} steps");
    }
}
