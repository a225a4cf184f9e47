//! The request to go, which does not wait for the guest's answer.

use super::*;

#[tokio::test]
async fn the_program_is_told_to_go_before_the_guest_has_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 1, |_, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        hear_until(&mut socket, &guest, FrameKind::Go).await;
        say(&mut socket, FrameKind::Opened, &Opened::default()).await;
        say(&mut socket, FrameKind::Exit, &Exit { code: 9 }).await;
        while hear(&mut socket, &guest).await.is_some() {}
    });
    let outcome = attend(&client, command(), None, vec![], nothing).await;
    assert_eq!(outcome.end.unwrap(), End::Exit(9));
    assert_eq!(guest.lock().unwrap().runs, 1);
}

/// The connection breaks before the guest has answered. Whether the program was started is not known, so it is not asked for
/// again, only looked for.
#[tokio::test]
async fn what_may_have_been_started_is_not_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 1, |_, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
    });
    let error = attend(&client, command(), None, vec![], nothing).await.end.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable, "{error}");
    assert_eq!(guest.lock().unwrap().opens.len(), 1);

    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 2, |number, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        if number == 0 {
            hear_until(&mut socket, &guest, FrameKind::Go).await;
            return;
        }
        let opened = Opened {
            existing: true,
            started: true,
            ..Opened::default()
        };
        say(&mut socket, FrameKind::Opened, &opened).await;
        say(&mut socket, FrameKind::Exit, &Exit { code: 7 }).await;
    });
    let outcome = attend(&client, command(), None, vec![], nothing).await;
    assert_eq!(outcome.end.unwrap(), End::Exit(7));
    let guest = guest.lock().unwrap();
    assert!(!guest.opens[0].attach_only && guest.opens[1].attach_only);
    assert_eq!(guest.runs, 1);
}

#[tokio::test]
async fn a_machine_that_was_suspended_is_not_woken_by_its_own_client() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 2, |_, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Go).await;
        say(&mut socket, FrameKind::Opened, &Opened::default()).await;
        guest.lock().unwrap().state = Some(MachineState::Suspending);
    });
    let error = attend(&client, command(), None, vec![], open_but_silent)
        .await
        .end
        .unwrap_err();
    assert_eq!(error.kind, Kind::Conflict, "{error}");
    assert!(error.hint.unwrap().contains("banger vm attach m1 s1"));
    assert_eq!(guest.lock().unwrap().opens.len(), 1, "it was not asked for again");
}
