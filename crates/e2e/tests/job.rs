//! The main job: a repository goes in, a command runs, its output and its status come out.

use std::path::Path;

use banger_testkit::repository::git;
use banger_testkit::{Repository, TestEnv};

use crate::harness::{MACHINES, noise, sha256, shared, tests};

tests! { MACHINES;
    the_job,
    the_work_tree_arrives_as_it_is,
    what_is_asked_for_goes_in_too,
    statuses_come_out,
    words_arrive_as_they_were,
    a_hundred_megabytes,
    what_is_no_repository_is_refused,
    a_dry_run_makes_nothing,
    a_repository_may_be_young,
    a_workspace_belongs_to_its_user,
}

fn a_workspace_belongs_to_its_user() {
    let env = shared();
    Repository::typical(env.work().join("owned"));
    std::fs::write(
        env.work().join("identity"),
        "[user]\n\tname = Some One\n\temail = one@example.invalid\n",
    )
    .unwrap();
    let script = "id -u; stat -c %u . .git README .git/config; git status --porcelain; git config user.name; \
                  echo more >README; git commit -qam more; git log -1 --format=%ae";
    let run = |options: &[&str]| {
        let args = [
            &["vm", "run", "--rm", "debian", "./owned"],
            options,
            &["--", "sh", "-c", script],
        ]
        .concat();
        let identity = env.work().join("identity");
        env.banger(args)
            .env("GIT_CONFIG_GLOBAL", identity)
            .deadline(180)
            .run()
            .code(0)
    };
    let done = run(&["--user", "1234", "--workdir", "/srv/its/repo"]);
    let expected = "1234\n1234\n1234\n1234\n1234\nSome One\none@example.invalid\n";
    assert_eq!(done.out(), expected, "{}", done.err());
    // Without a place: in the home directory.
    let done = env
        .banger([
            "vm",
            "run",
            "--rm",
            "debian",
            "./owned",
            "--user",
            "www-data",
            "--",
            "sh",
            "-c",
            "pwd; id -un; git status --porcelain",
        ])
        .deadline(180)
        .run()
        .code(0);
    assert_eq!(done.out(), "/var/www/repo\nwww-data\n", "{}", done.err());
    let done = env
        .banger(["vm", "run", "--rm", "./owned", "--user", "nosuch", "--", "true"])
        .deadline(180)
        .run()
        .code(125);
    done.says(&["no user `nosuch`", "hint:"]);
}

fn the_job() {
    let env = TestEnv::new("job");
    let repository = Repository::typical(env.work().join("repo"));
    let done = env
        .banger([
            "vm",
            "run",
            "--rm",
            "--name",
            "job",
            "./repo",
            "--",
            "sh",
            "-c",
            "pwd; cat README; ./run.sh; hostname; id -un",
        ])
        .run()
        .code(0)
        .prints("/root/repo\nhello\nran in /root/repo\njob\nroot\n")
        .says(&["spec:", "1 vcpu", "512 MiB", "4G"]);
    // B30: the reminder that a machine is still running was printed under --rm.
    assert!(!done.err().contains("still running"), "{}", done.err());
    assert!(env.machine_names().is_empty());
    assert_eq!(repository.status(), "", "the repository on the host was touched");
    env.close();
}

fn the_work_tree_arrives_as_it_is() {
    let env = shared();
    let repository = Repository::typical(env.work().join("as-it-is"));
    for i in 0..15 {
        repository.write("counter", i.to_string());
        repository.commit(&format!("commit {i}"));
    }
    repository.git(&[
        "remote",
        "add",
        "origin",
        "https://user:hunter2@example.invalid/repo.git",
    ]);
    repository.write("README", "changed\n");
    repository.write("staged", "new\n");
    repository.git(&["add", "staged"]);
    std::fs::remove_file(repository.path().join("src/deep/main.c")).unwrap();
    let before = repository.status();
    repository.write("secret.env", "TOKEN=1\n");
    env.banger(["vm", "run", "-d", "--name", "as-it-is", "./as-it-is"])
        .deadline(120)
        .ok()
        .says(&["untracked", "--include-untracked"]);

    env.ok("vm cp as-it-is:/root/repo out-as-it-is");
    let copy = env.work().join("out-as-it-is");
    let in_copy = |args: &[&str]| {
        let output = git(&copy).args(args).output().unwrap();
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(in_copy(&["status", "--porcelain"]), before);
    assert_eq!(in_copy(&["rev-parse", "HEAD"]).trim(), repository.head());
    assert_eq!(in_copy(&["branch", "--show-current"]).trim(), "main");
    assert_eq!(in_copy(&["fsck", "--no-progress"]), "");
    let commits: u32 = in_copy(&["rev-list", "--count", "HEAD"]).trim().parse().unwrap();
    assert!((1..=12).contains(&commits), "history is not shallow: {commits} commits");
    // The origin without the user's credentials.
    assert_eq!(
        in_copy(&["remote", "get-url", "origin"]).trim(),
        "https://example.invalid/repo.git"
    );
    // B8: untracked secrets were copied by default.
    for absent in ["secret.env", "ignored.log", "build", "src/deep/main.c"] {
        assert!(!copy.join(absent).exists(), "{absent} is in the machine");
    }
    assert_eq!(std::fs::read_link(copy.join("link")).unwrap(), Path::new("README"));
    assert_eq!(env.machine("as-it-is")["workspace"]["guest_path"], "/root/repo");
    env.ok("vm exec as-it-is -- test -x run.sh");
    env.ok("vm delete as-it-is");
}

fn what_is_asked_for_goes_in_too() {
    let env = shared();
    let repository = Repository::typical(env.work().join("asked"));
    let first = repository.git(&["rev-parse", "HEAD~1"]).trim().to_owned();
    repository.write("untracked dir/file", "wanted\n");
    let done = env
        .banger([
            "vm",
            "run",
            "--rm",
            "--name",
            "asked",
            "./asked",
            "--include-untracked",
            "--workdir",
            "/srv/code",
            "--",
        ])
        .args([
            "sh",
            "-c",
            "pwd; cat 'untracked dir/file'; ls ignored.log 2>/dev/null; cat .git/HEAD",
        ])
        .run()
        .code(0);
    assert_eq!(done.out(), "/srv/code\nwanted\nref: refs/heads/main\n");

    env.banger([
        "vm", "run", "-d", "--name", "branched", "./asked", "--branch", "topic", "--from", "HEAD~1",
    ])
    .deadline(120)
    .ok();
    env.ok("vm cp branched:/root/repo out-branched");
    let copy = env.work().join("out-branched");
    let head = String::from_utf8(git(&copy).args(["rev-parse", "HEAD"]).output().unwrap().stdout).unwrap();
    assert_eq!(head.trim(), first);
    assert_eq!(
        std::fs::read_to_string(copy.join(".git/HEAD")).unwrap(),
        "ref: refs/heads/topic\n"
    );
    assert!(!copy.join("run.sh").exists(), "a file of the second commit is there");
    assert_eq!(
        repository.git(&["branch", "--list"]).trim(),
        "* main",
        "a branch was made on the host"
    );
    env.ok("vm delete branched");
    env.run("vm run --rm ./asked --branch x --from nosuchref -- true")
        .fails()
        .says(&["nosuchref"]);
}

// B3, B4: statuses of other programs leaked, and `exit 42` became 0.
fn statuses_come_out() {
    let env = shared();
    env.run("vm run --rm -- false").code(1);
    env.banger(["vm", "run", "--rm", "--", "sh", "-c", "exit 42"])
        .run()
        .code(42);
    env.run("vm run --rm -- no-such-command")
        .code(127)
        .says(&["no-such-command"]);
}

// B4: arguments were joined to one string and taken apart again.
fn words_arrive_as_they_were() {
    let (env, slim) = crate::harness::slim();
    let words = ["a b", "", "$HOME", "`id`", "x\ny", "'\"", "-n", "--", "ä", "*"];
    let done = env
        .banger([
            "vm",
            "exec",
            slim,
            "--",
            "sh",
            "-c",
            "for w; do printf '<%s>' \"$w\"; done",
            "sh",
        ])
        .args(words)
        .ok();
    let expected: String = words.iter().map(|w| format!("<{w}>")).collect();
    assert_eq!(done.out(), expected);
}

fn a_hundred_megabytes() {
    let env = shared();
    let repository = Repository::empty(env.work().join("big"));
    let content = noise(10_000_000);
    for i in 0..10 {
        let mut content = content.clone();
        content[0] = i;
        repository.write(&format!("file{i}"), content);
    }
    repository.commit("large");
    let last = std::fs::read(repository.path().join("file9")).unwrap();
    let done = env
        .banger([
            "vm",
            "run",
            "--rm",
            "--name",
            "big",
            "./big",
            "--",
            "sh",
            "-c",
            "cat file* | wc -c; sha256sum <file9",
        ])
        .deadline(120)
        .run()
        .code(0);
    assert_eq!(done.out(), format!("100000000\n{}  -\n", sha256(&last)));
}

fn what_is_no_repository_is_refused() {
    let env = TestEnv::bare("refusals");
    let work = env.work();
    std::fs::create_dir(work.join("plain")).unwrap();
    let repository = Repository::typical(work.join("repo"));
    repository.git(&["clone", "--quiet", "--bare", ".", "../bare.git"]);
    let outer = Repository::typical(work.join("outer"));
    outer.git(&["submodule", "--quiet", "add", "../repo", "sub"]);
    outer.commit("with a submodule");
    std::fs::write(work.join("file"), "").unwrap();
    for (path, parts) in [
        ("./plain", &["plain", "git", "hint:"] as &[&str]),
        ("./bare.git", &["bare"]),
        ("./outer", &["submodule", "hint:"]),
        ("./nowhere", &["nowhere"]),
        ("./file", &["file"]),
    ] {
        for dry in [&[] as &[&str], &["--dry-run"]] {
            // B3: git's own status, 128, is not ours.
            let args = [&["vm", "run", "--rm", path], dry, &["--", "true"]].concat();
            env.banger(args).run().code(125).says(parts);
        }
    }
    assert!(
        env.processes().is_empty(),
        "a refused workspace started {:?}",
        env.processes()
    );
    env.close();
}

fn a_dry_run_makes_nothing() {
    let env = TestEnv::bare("dry-run");
    let repository = Repository::typical(env.work().join("repo"));
    repository.write("extra.txt", "untracked");
    let done = env.ok("vm run ./repo --dry-run");
    let listed = done.out();
    for file in ["README", "run.sh", "src/deep/main.c", "name with space äö.txt", "link"] {
        assert!(
            listed.lines().any(|l| l.ends_with(file)),
            "{file} is not listed:\n{listed}"
        );
    }
    assert!(
        !listed.contains("extra.txt") && !listed.contains("ignored.log"),
        "{listed}"
    );
    let more = env.ok("vm run ./repo --dry-run --include-untracked").out();
    assert!(more.contains("extra.txt") && !more.contains("ignored.log"), "{more}");
    assert!(env.processes().is_empty(), "a dry run started {:?}", env.processes());
    env.close();
}

fn a_repository_may_be_young() {
    let env = shared();
    let repository = Repository::empty(env.work().join("young"));
    let done = env.banger(["vm", "run", "--rm", "./young", "--", "true"]).run();
    // Without any commit there is nothing to check out: either it goes in as it is or the error says so.
    if done.status != 0 {
        done.fails().says(&["commit", "hint:"]);
    }
    repository.write("only", "one\n");
    repository.commit("first");
    // A directory inside the repository stands for the whole.
    repository.write("sub/file", "x\n");
    repository.commit("second");
    let done = env
        .banger(["vm", "run", "--rm", "./young/sub", "--", "sh", "-c", "ls /root/repo"])
        .run()
        .code(0);
    assert!(done.out().contains("only"), "{}", done.out());
}
