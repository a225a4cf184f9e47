//! Figures.

use super::*;

/// Prints what saving and going on cost. Not a test of anything.
#[tokio::test]
#[ignore = "measures"]
async fn figures() {
    let Some(qemu) = qemu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut bed = Bed::new(&answering_kernel());
    bed.plan.memory_mib = 512;
    let handles = bed.launch(&qemu).await;
    for mib in 1..=150 {
        fill(&qemu, &handles, mib, mib).await;
    }
    let mut last = None;
    for n in 0..6 {
        let saved = saved(dir.path(), &n.to_string());
        let started = Instant::now();
        let report = qemu.save(&handles, &plan(&saved), Steps::none()).await.unwrap();
        eprintln!("save of 150 MiB: paused {:?} of {:?}", report.paused, started.elapsed());
        last = Some(saved);
    }
    end(&qemu, &handles).await;
    let saved_at = last.unwrap();
    for n in 0..6 {
        let copy = waiting(&bed, &saved_at, Vec::new());
        let started = Instant::now();
        let handles = copy.launch(&qemu).await;
        let launched = started.elapsed();
        qemu.resume(&handles, Still::Loaded).await.unwrap();
        let resumed = started.elapsed();
        ask(&qemu, &handles, b"e", 1).await;
        eprintln!(
            "launch {launched:?}, resume {resumed:?}, answer {:?}",
            started.elapsed()
        );
        let mut save = plan(&saved(dir.path(), &format!("copy{n}")));
        save.base = Some(saved_at.memory.clone());
        let started = Instant::now();
        let report = qemu.save(&handles, &save, Steps::none()).await.unwrap();
        eprintln!("save of a copy: paused {:?} of {:?}", report.paused, started.elapsed());
        end(&qemu, &handles).await;
    }
}
