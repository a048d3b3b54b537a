// Stacks that one OS thread switches between.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)

// The saved stack pointer; the registers a call preserves lie on the stack. ucontext asks the kernel for the signal mask
// at each switch, which is two orders of magnitude slower.
struct Context {
    void *stack_pointer;
};

asm(R"(
.text
.local switch_stacks
.type switch_stacks, @function
switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size switch_stacks, . - switch_stacks
)");
extern "C" void switch_stacks(void **save, void *load) __attribute__((visibility("hidden")));

inline void prepare(Context &context, unsigned char *stack, size_t stack_bytes, void (*entry)()) {
    uintptr_t top = ((uintptr_t)stack + stack_bytes) & ~(uintptr_t)15;
    // At entry the stack is 8 off a multiple of 16, as after a call; below the address lie the six registers.
    void **slots = (void **)(top - 16);
    slots[0] = (void *)entry;
    slots[1] = nullptr;
    for (int i = 1; i <= 6; i++) slots[-i] = nullptr;
    context.stack_pointer = slots - 6;
}
inline void switch_to(Context &from, Context &to) { switch_stacks(&from.stack_pointer, to.stack_pointer); }

#else
#include <ucontext.h>

struct Context {
    ucontext_t state;
};
inline void prepare(Context &context, unsigned char *stack, size_t stack_bytes, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = stack_bytes;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}
inline void switch_to(Context &from, Context &to) { swapcontext(&from.state, &to.state); }

#endif
