//! A guest of a few hundred bytes that drives the guest channel and its disks, by polling, without interrupts.
//!
//! It answers what it is sent on the channel. The first byte says what is wanted, numbers are single bytes:
//!
//! | sent | does | answer |
//! |---|---|---|
//! | `e…` | | the same |
//! | `m` N V | fills the N-th MiB after the first 16 with V | `M` |
//! | `g` N | | first and last four bytes of that MiB |
//! | `w` S V D | fills sector S of disk D with V, and flushes | status, 0 is good |
//! | `r` S D | | the sector, 512 bytes |
//! | `c` | | a count of the rounds it has made, 4 bytes |
#![allow(unsafe_code)]

core::arch::global_asm!(
    r#"
    .pushsection .rodata.banger_test_guest, "a"
    .globl banger_test_guest_start
    .globl banger_test_guest_end
    .code32
banger_test_guest_start:
    cld
    mov esp, 0x1f0000
    mov dword ptr [0x290010], 0
    mov dword ptr [0x290014], 0
    mov esi, 0xfeb00000
    mov ecx, 24
14: cmp dword ptr [esi], 0x74726976
    jne 13f
    mov eax, [esi + 8]
    cmp eax, 3
    je 15f
    cmp eax, 2
    jne 13f
    # A disk: its address is kept.
    mov eax, 0x290010
    cmp dword ptr [eax], 0
    je 12f
    add eax, 4
12: mov [eax], esi
    jmp 13f
15: mov [0x290020], esi
13: add esi, 0x200
    dec ecx
    jnz 14b

    # Disks: one queue each.
    xor edi, edi
20: mov esi, [0x290010 + edi * 4]
    test esi, esi
    jz 21f
    xor eax, eax
    call 30f
    xor ebx, ebx
    lea edx, [edi + 8]
    call 32f
    mov dword ptr [esi + 0x70], 15
21: inc edi
    cmp edi, 2
    jb 20b

    # Channel: six queues.
    mov esi, [0x290020]
    mov eax, 2
    call 30f
    xor ebx, ebx
22: mov edx, ebx
    call 32f
    inc ebx
    cmp ebx, 6
    jb 22b
    mov dword ptr [esi + 0x70], 15
    mov ebx, 2
    call 34f
    mov ebx, 4
    call 34f
    # Ready; port 1 ready; port 1 open.
    mov ebx, 3
    mov edi, 0x290040
    mov ecx, 8
    mov dword ptr [edi], 0
    mov dword ptr [edi + 4], 0x00010000
    call 40f
    mov dword ptr [edi], 1
    mov dword ptr [edi + 4], 0x00010003
    call 40f
    mov dword ptr [edi + 4], 0x00010006
    call 40f

    xor ebp, ebp
50: inc dword ptr [0x290000]
    pause
    movzx eax, word ptr [0x212002]
    cmp ax, bp
    je 50b
    mov eax, ebp
    and eax, 15
    mov edx, [0x212004 + eax * 8]
    mov ecx, [0x212008 + eax * 8]
    push edx
    shl edx, 10
    lea edi, [edx + 0x340000]
    mov al, [edi]
    cmp al, 'e'
    je 60f
    cmp al, 'm'
    je 61f
    cmp al, 'g'
    je 62f
    cmp al, 'w'
    je 63f
    cmp al, 'r'
    je 64f
    cmp al, 'c'
    je 65f
    jmp 70f
61: movzx edx, byte ptr [edi + 1]
    movzx eax, byte ptr [edi + 2]
    imul eax, eax, 0x01010101
    add edx, 16
    shl edx, 20
    mov edi, edx
    mov ecx, 0x40000
    rep stosd
    mov edi, 0x290080
    mov byte ptr [edi], 'M'
    mov ecx, 1
    jmp 60f
62: movzx edx, byte ptr [edi + 1]
    add edx, 16
    shl edx, 20
    mov edi, 0x290080
    mov eax, [edx]
    mov [edi], eax
    mov eax, [edx + 0xffffc]
    mov [edi + 4], eax
    mov ecx, 8
    jmp 60f
63: movzx edx, byte ptr [edi + 1]
    movzx eax, byte ptr [edi + 2]
    movzx ebx, byte ptr [edi + 3]
    imul eax, eax, 0x01010101
    mov edi, 0x280200
    mov ecx, 128
    rep stosd
    mov eax, 1
    call 80f
    mov eax, 4
    call 80f
    mov edi, 0x280010
    mov ecx, 1
    jmp 60f
64: movzx edx, byte ptr [edi + 1]
    movzx ebx, byte ptr [edi + 2]
    xor eax, eax
    call 80f
    mov edi, 0x280200
    mov ecx, 512
    jmp 60f
65: mov edi, 0x290000
    mov ecx, 4
60: mov ebx, 5
    call 40f
    # The buffer goes back.
70: pop edx
    movzx eax, word ptr [0x211002]
    mov ecx, eax
    and ecx, 15
    mov [0x211004 + ecx * 2], dx
    inc eax
    mov [0x211002], ax
    mov dword ptr [esi + 0x50], 4
    inc bp
    jmp 50b

    # esi: device, eax: features.
30: mov dword ptr [esi + 0x70], 0
    mov dword ptr [esi + 0x70], 1
    mov dword ptr [esi + 0x70], 3
    mov dword ptr [esi + 0x24], 0
    mov [esi + 0x20], eax
    mov dword ptr [esi + 0x24], 1
    mov dword ptr [esi + 0x20], 1
    mov dword ptr [esi + 0x70], 11
    ret

    # esi: device, ebx: queue, edx: where it lies.
32: mov [esi + 0x30], ebx
    mov dword ptr [esi + 0x38], 16
    mov eax, edx
    shl eax, 14
    add eax, 0x200000
    mov [esi + 0x80], eax
    add eax, 0x1000
    mov [esi + 0x90], eax
    add eax, 0x1000
    mov [esi + 0xa0], eax
    mov dword ptr [esi + 0x44], 1
    ret

    # esi: device, ebx: queue that gets 16 empty buffers.
34: mov edx, ebx
    shl edx, 14
    add edx, 0x200000
    mov eax, ebx
    shl eax, 16
    add eax, 0x300000
    xor ecx, ecx
35: push ecx
    shl ecx, 4
    mov [edx + ecx], eax
    mov dword ptr [edx + ecx + 4], 0
    mov dword ptr [edx + ecx + 8], 0x400
    mov dword ptr [edx + ecx + 12], 2
    pop ecx
    mov [edx + ecx * 2 + 0x1004], cx
    add eax, 0x400
    inc ecx
    cmp ecx, 16
    jb 35b
    mov word ptr [edx + 0x1002], 16
    mov [esi + 0x50], ebx
    ret

    # esi: device, ebx: queue, edi, ecx: what is sent.
40: mov edx, ebx
    shl edx, 14
    add edx, 0x200000
    mov [edx], edi
    mov dword ptr [edx + 4], 0
    mov [edx + 8], ecx
    mov dword ptr [edx + 12], 0
42: movzx eax, word ptr [edx + 0x1002]
    push eax
    and eax, 15
    mov word ptr [edx + eax * 2 + 0x1004], 0
    pop eax
    inc eax
    mov [edx + 0x1002], ax
    mov [esi + 0x50], ebx
41: pause
    cmp [edx + 0x2002], ax
    jne 41b
    ret

    # eax: request, edx: sector, ebx: disk.
80: push esi
    push ebx
    push edx
    mov esi, [0x290010 + ebx * 4]
    mov [0x280000], eax
    mov dword ptr [0x280004], 0
    mov [0x280008], edx
    mov dword ptr [0x28000c], 0
    lea edx, [ebx + 8]
    shl edx, 14
    add edx, 0x200000
    mov dword ptr [edx], 0x280000
    mov dword ptr [edx + 8], 16
    mov dword ptr [edx + 12], 0x00010001
    mov dword ptr [edx + 16], 0x280200
    mov dword ptr [edx + 24], 512
    mov dword ptr [edx + 28], 0x00020001
    test eax, eax
    jnz 81f
    mov dword ptr [edx + 28], 0x00020003
81: cmp eax, 4
    jne 82f
    mov dword ptr [edx + 12], 0x00020001
82: mov dword ptr [edx + 32], 0x280010
    mov dword ptr [edx + 40], 1
    mov dword ptr [edx + 44], 2
    xor ebx, ebx
    call 42b
    pop edx
    pop ebx
    pop esi
    ret
banger_test_guest_end:
    .code64
    .popsection
    "#
);

unsafe extern "C" {
    static banger_test_guest_start: u8;
    static banger_test_guest_end: u8;
}

/// The code, for any address.
pub fn code() -> Vec<u8> {
    let (start, end) = (&raw const banger_test_guest_start, &raw const banger_test_guest_end);
    let length = end.addr() - start.addr();
    // SAFETY: both are labels of one stretch of constant data, in this order.
    unsafe { std::slice::from_raw_parts(start, length) }.to_vec()
}
